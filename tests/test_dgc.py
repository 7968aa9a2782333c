"""Deep Gradient Compression: the algorithm as written, its limits, its stages, and its point."""

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from convex_problems import AXIS, run, top_k_numpy

import jaxcomm
from jaxcomm.compressors import block_top_k, identity, top_k
from jaxcomm.transforms import deep_gradient_compression, error_feedback

N = 4
PARAMS = {"w": jnp.zeros((5, 4)), "b": jnp.zeros((3,))}


def noise(x, data, key):
    """Gradients that depend on the worker and the step alone."""
    g = lambda shape, i: jax.random.normal(jax.random.fold_in(key, i), shape) + data
    return {"w": g((5, 4), 0) + 0.1 * x["w"], "b": g((3,), 1)}


def track(tx, steps, gradient=noise, n=N, x0=PARAMS):
    """Gradients, updates' effect and states by step, worker axis first."""

    def worker(data):
        def one_round(carry, t):
            x, state = carry
            key = jax.random.fold_in(jax.random.key(t), jax.lax.axis_index(AXIS))
            g = gradient(x, data, key)
            updates, new = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), new), (g, updates, new)

        return jax.lax.scan(one_round, (x0, tx.init(x0)), jnp.arange(steps))

    return jax.jit(jax.vmap(worker, axis_name=AXIS))(jnp.linspace(-1, 1, n))


def dgc_numpy(gradients, k, *, m=0.9, nesterov=False, clip=None, masking=True):
    """Outputs for 'w' and 'b', from the gradients, by the released code's rules in float64."""
    w, b = (np.float64(gradients[name]).swapaxes(0, 1) for name in ("w", "b"))  # (T, n, ...)
    steps, n = w.shape[:2]
    u, v, ub, out = np.zeros((n, 20)), np.zeros((n, 20)), np.zeros(3), []
    for t in range(steps):
        gw, gb = w[t].reshape(n, 20), b[t]
        if clip is not None:
            norm = np.sqrt((gw**2).sum(1) + (gb**2).sum(1))
            scale = np.minimum(1, clip / np.sqrt(n) / norm)[:, None]
            gw, gb = gw * scale, gb * scale
        mean = gb.mean(0)
        u, ub = (m * (u + gw), m * (ub + mean)) if nesterov else (m * u + gw, m * ub + mean)
        v = v + u + (gw if nesterov else 0)
        sent = np.stack([top_k_numpy(row, k) for row in v])
        v = np.where(sent != 0, 0, v)
        u = np.where(sent != 0, 0, u) if masking else u
        out.append((sent.mean(0).reshape(5, 4), ub + (mean if nesterov else 0)))
    return [np.stack(x) for x in zip(*out)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True, "clip_norm": 3.0},
        {"factor_masking": False, "momentum": 0.5},
    ],
)
def test_matches_the_algorithm_as_written(options):
    _, (g, updates, _) = track(deep_gradient_compression(0.1, AXIS, **options), 40)
    names = {"momentum": "m", "clip_norm": "clip", "factor_masking": "masking"}
    w, b = dgc_numpy(g, 2, **{names.get(name, name): value for name, value in options.items()})
    for worker in (0, 3):
        np.testing.assert_allclose(updates["w"][worker], w, atol=1e-4)
        np.testing.assert_allclose(updates["b"][worker], b, atol=1e-4)


@pytest.mark.parametrize(
    ("masking", "nesterov", "sparsifier"),
    [(False, False, top_k), (False, True, lambda fraction: identity()), (True, False, top_k)],
)
def test_dense_limit(masking, nesterov, sparsifier):
    """Everything sent: momentum SGD without factor masking, plain SGD with it."""
    options = {"nesterov": nesterov, "factor_masking": masking, "sparsifier": sparsifier}
    dgc = deep_gradient_compression(1.0, AXIS, dense_ndim=0, **options)
    (x, _), _ = track(optax.chain(dgc, optax.sgd(0.1)), 30)
    sgd = optax.sgd(0.1, momentum=None if masking else 0.9, nesterov=nesterov)
    (expected, _), _ = track(optax.chain(jaxcomm.average(AXIS), sgd), 30)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), x, expected)


def test_nothing_is_lost_without_masking():
    """sum_t sent_t + v_T = sum_t u_t, on the mean over the workers."""
    tx = deep_gradient_compression(0.1, AXIS, factor_masking=False)
    (_, final), (_, updates, states) = track(tx, 60)
    sent = np.float64(updates["w"][0]).sum(0) + np.float64(final.velocity["w"]).mean(0)
    velocities = np.float64(states.momentum["w"]).sum(1).mean(0)
    np.testing.assert_allclose(sent, velocities, atol=1e-4)


def test_a_coordinate_that_waits_sends_the_sum_of_its_velocities():
    """Small coordinate 1 is outbid nine times; momentum m = 1/2 discounts inside the sum."""

    def gradient(x, data, key):
        loud = jnp.where(x["t"] < 9, 100.0, 0.0)
        return {"w": jnp.stack([loud, 1.0 + x["t"]])[None], "t": -jnp.ones(())}

    x0 = {"w": jnp.zeros((1, 2)), "t": jnp.zeros(())}
    tx = deep_gradient_compression(0.5, AXIS, momentum=0.5, dense_ndim=0)
    clock = optax.partition({"w": tx, "t": optax.scale(-1.0)}, {"w": "w", "t": "t"})
    _, (_, updates, _) = track(clock, 10, gradient, n=1, x0=x0)
    seen = np.asarray(updates["w"][0, :, 0, 1])
    np.testing.assert_array_equal(seen[:9], 0)
    u, velocities = 0.0, 0.0
    for t in range(10):
        u = 0.5 * u + 1.0 + t
        velocities += u
    np.testing.assert_allclose(seen[9], velocities, rtol=1e-6)


def test_stages_of_the_warm_up():
    """1,000 coordinates: how many are sent at each step, for one worker."""
    x0 = {"w": jnp.zeros((10, 100))}
    random = lambda x, data, key: {"w": jax.random.normal(key, (10, 100))}
    tx = deep_gradient_compression(0.001, AXIS, warmup_steps=10)
    _, (_, updates, _) = track(tx, 13, random, n=1, x0=x0)
    counts = (np.asarray(updates["w"][0]) != 0).sum((1, 2))
    np.testing.assert_array_equal(counts, [250] * 3 + [63] * 2 + [16] * 3 + [4] * 2 + [1] * 3)
    ramp = [0.1 ** ((e + 1) / 3) for e in range(2)]
    tx = deep_gradient_compression(0.1, AXIS, warmup_steps=4, warmup_fractions=ramp)
    _, (_, updates, _) = track(tx, 6, random, n=1, x0=x0)
    counts = (np.asarray(updates["w"][0]) != 0).sum((1, 2))
    np.testing.assert_array_equal(counts, [465] * 2 + [216] * 2 + [100] * 2)


def test_what_travels_and_what_stays_dense(monkeypatch):
    """Only w (6 x 5) is compressed; the bias and the scale go as one sum, named and logged."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    tx = optax.chain(deep_gradient_compression(0.07, AXIS), optax.sgd(0.1))
    sent = [x for x in composition.wire(tx) if x[1] != "metrics"]
    assert sorted((part, shape, dtype) for _, part, shape, dtype in sent) == [
        ("dense", (6,), "float32"),
        ("indices", (2,), "uint8"),  # 3 indices of 5 bits
        ("values", (3,), "uint32"),
    ]
    assert any("['b'], ['scale']" in line and "2 leaves stay dense" in line for line in lines)
    everything = deep_gradient_compression(0.07, AXIS, dense_ndim=-1)
    assert not [
        x for x in composition.wire(optax.chain(everything, optax.sgd(0.1))) if x[1] == "dense"
    ]
    nothing = deep_gradient_compression(0.07, AXIS, dense_ndim=2)
    sent = [x for x in composition.wire(optax.chain(nothing, optax.sgd(0.1))) if x[1] != "metrics"]
    assert [x[1:3] for x in sent] == [("dense", (36,))]


def logistic(seed, workers=8, rows=64, d=500):
    """Rows with a worker's own scales, and labels of a common teacher."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(workers, rows, d)) * rng.lognormal(0, 0.5, size=(workers, 1, d))
    b = np.sign(a @ rng.normal(size=d) + rng.normal(size=(workers, rows)))
    return {"a": a.astype(np.float32), "b": b.astype(np.float32)}


def logistic_loss(x, data):
    return jnp.mean(jnp.logaddexp(0.0, -data["b"] * (data["a"] @ x[:, 0])))


def losses(tx, data, steps):
    """Loss on everyone's rows before each step; minibatches of eight."""
    everything = jax.tree.map(lambda z: jnp.asarray(z).reshape(-1, *z.shape[2:]), data)

    def gradient(x, data, key):
        pick = jax.random.choice(key, 64, (8,), replace=False)
        return jax.grad(logistic_loss)(x, jax.tree.map(lambda z: z[pick], data))

    observe = lambda x, s, g: logistic_loss(x, everything)
    return np.asarray(run(tx, gradient, data, np.zeros((500, 1)), steps, observe=observe)[1][0])


@pytest.mark.slow
def test_closer_to_momentum_sgd_than_momentum_after_error_feedback():
    """Eight workers, one percent sent, a large step: distance to the dense method's loss curve.

    Large steps are where a momentum that does not know of the wait does harm: at a fifth of this
    learning rate the order is the other way round.
    """
    distance = {"dgc": 0.0, "momentum after": 0.0}
    for seed in range(2):
        data = logistic(seed)
        sgd = lambda momentum: optax.sgd(0.5, momentum=momentum)
        dense = losses(optax.chain(jaxcomm.average(AXIS), sgd(0.9)), data, 300)
        dgc = deep_gradient_compression(0.01, AXIS, dense_ndim=0)
        plain = error_feedback(top_k(0.01), AXIS)
        for name, tx in (("dgc", (dgc, sgd(None))), ("momentum after", (plain, sgd(0.9)))):
            distance[name] += np.abs(losses(optax.chain(*tx), data, 300) - dense).mean()
    assert distance["dgc"] < 0.95 * distance["momentum after"], distance


@pytest.mark.slow
def test_composes():
    composition.check_all(
        lambda: deep_gradient_compression(
            0.1,
            AXIS,
            warmup_steps=3,
            clip_norm=1.0,
            sparsifier=lambda f: block_top_k(f, block_size=8),
        )
    )
    injected = optax.inject_hyperparams(
        deep_gradient_compression,
        static_args=("fraction", "warmup_steps", "dense_ndim", "sparsifier", "seed"),
    )(0.1, AXIS, momentum=optax.linear_schedule(0.5, 0.9, 3))
    composition.check(optax.chain(injected, optax.sgd(0.01)), simulate=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction must be in"),
        ({"fraction": jnp.float32(0.1)}, "fraction must .* name it in static_args"),
        ({"warmup_steps": jnp.int32(2)}, "warmup_steps must .* name it in static_args"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"warmup_steps": 5, "warmup_fractions": (0.1, 0.2)}, "must fall"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        deep_gradient_compression(**{"fraction": 0.1, "axis_name": AXIS, **arguments})
