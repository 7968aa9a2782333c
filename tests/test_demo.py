"""DeMo: blocks of any tensor, the algorithm against SciPy's DCT, and its identities."""

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from absl import logging
from convex_problems import AXIS

import jaxcomm
from jaxcomm.transforms import demo
from jaxcomm.transforms._demo import cut, from_spectrum, spectrum

N = 3
PARAMS = {"w": jnp.zeros((20, 12)), "b": jnp.ones((7,)), "c": jnp.zeros((2, 3, 10))}


def track(tx, steps, n=N, x0=PARAMS):
    """Params, gradients and states by step, worker axis first; gradients differ by worker."""

    rng, bias = np.random.default_rng(0), np.linspace(-1, 1, n)
    draw = lambda v: rng.normal(bias, size=(*v.shape, steps, n)).astype(np.float32).T

    def worker(noise):
        def one_round(carry, drawn):
            x, state = carry
            g = jax.tree.map(lambda v, z: v + z.T, x, drawn)
            updates, new = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), new), (x, g, new)

        return jax.lax.scan(one_round, (x0, tx.init(x0)), noise)

    return jax.jit(jax.vmap(worker, axis_name=AXIS))(jax.tree.map(draw, x0))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((128, 64), (64, 64)),
        ((96, 10), (48, 10)),  # the largest divisor up to 64, as in the released code
        ((257,), (1, 52)),  # a prime side: five blocks, three zeros of padding
        ((3, 3, 5, 70), (45, 35)),
        ((), (1, 1)),
    ],
)
def test_spectrum_of_any_shape(shape, block):
    """Equal to SciPy's, orthonormal, and undone by its inverse."""
    blocks = cut(shape, 64)
    assert (blocks.height, blocks.width) == block
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    coefficients = np.asarray(spectrum(jnp.asarray(x), blocks))
    corner = x.reshape(-1, shape[-1] if shape else 1)[: block[0], : block[1]]
    np.testing.assert_allclose(
        coefficients[0].reshape(block), scipy.fft.dctn(corner, norm="ortho"), atol=1e-5
    )
    np.testing.assert_allclose((coefficients**2).sum(), (x**2).sum(), rtol=1e-5)
    back = from_spectrum(jnp.asarray(coefficients), blocks)
    np.testing.assert_allclose(back, x, atol=1e-5)


def demo_numpy(x, gradients, *, k, side, gamma, beta, decay):
    """The released code's step for one matrix whose sides `side` divides, in float64."""
    n, (a, b) = gradients.shape[1], x.shape
    at = [(i, j) for i in range(0, a, side) for j in range(0, b, side)]
    delta, out = np.zeros((n, a, b)), []
    for g in np.float64(gradients):
        out.append(x)
        delta = beta * delta + gamma * g
        direction = np.zeros((a, b))
        for i, j in at:
            here = np.s_[i : i + side, j : j + side]
            total, senders = np.zeros(side * side), np.zeros(side * side)
            for w in range(n):
                c = scipy.fft.dctn(delta[w][here], norm="ortho").reshape(-1)
                keep = np.argsort(-np.abs(c), kind="stable")[:k]
                kept = np.zeros_like(c)
                kept[keep] = c[keep]
                total, senders[keep] = total + kept, senders[keep] + 1
                decoded = scipy.fft.idctn(kept.reshape(side, side), norm="ortho")
                delta[w][here] = delta[w][here] - decoded
            mean = (total / np.maximum(senders, 1)).reshape(side, side)
            direction[here] = scipy.fft.idctn(mean, norm="ortho")
        x = (1 - gamma * decay) * x - gamma * np.sign(direction)
    return np.stack(out), delta


def test_matches_the_algorithm_as_written():
    """Averages run over the workers that sent a coefficient; the lr is inside the momentum."""
    x0 = {"w": jnp.ones((8, 12))}
    tx = demo(0.01, AXIS, decay=0.9, k=3, chunk=4, weight_decay=0.1)
    (_, final), (x, g, _) = track(tx, 12, x0=x0)
    gradients = np.asarray(g["w"]).swapaxes(0, 1)
    expected, delta = demo_numpy(
        np.ones((8, 12)), gradients, k=3, side=4, gamma=0.01, beta=0.9, decay=0.1
    )
    for worker in range(N):
        np.testing.assert_allclose(x["w"][worker], expected, atol=1e-5)
    np.testing.assert_allclose(final.momentum["w"], delta, atol=1e-5)


def test_what_is_sent_leaves_the_momentum():
    """delta_new + q = beta delta_old + gamma g, where q has k coefficients a block."""
    _, (_, g, state) = track(demo(0.1, AXIS, decay=0.9, k=5, chunk=10), 10)
    momentum, g = np.float64(state.momentum["w"]), np.float64(g["w"])
    sent = 0.9 * momentum[:, :-1] + 0.1 * g[:, 1:] - momentum[:, 1:]
    blocks = cut((20, 12), 10)  # without padding
    coefficients = jax.vmap(jax.vmap(lambda q: spectrum(q, blocks)))(jnp.asarray(sent, jnp.float32))
    np.testing.assert_array_equal((np.abs(coefficients) > 1e-5).sum(-1), 5)


def test_all_coefficients_leave_nothing():
    """k = all: the momentum is empty after each step, and the move is gamma sgn(mean delta)."""
    (_, final), (x, g, _) = track(demo(0.1, AXIS, k=64, chunk=8), 5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(final.momentum))
    for name in PARAMS:
        move = np.diff(np.asarray(x[name][0]), axis=0)
        np.testing.assert_allclose(move, -0.1 * np.sign(np.mean(g[name], 0))[:-1], atol=1e-6)


def test_workers_stay_equal_and_schedules_count_steps():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    _, (x, _, _) = track(demo(schedule, AXIS, k=4, chunk=8), 10)
    for leaf in jax.tree.leaves(x):
        np.testing.assert_array_equal(leaf[0], leaf[2])
    moves = np.abs(np.diff(np.asarray(x["w"][0]), axis=0)).max((1, 2))
    np.testing.assert_allclose(moves, 0.1 - 0.01 * np.arange(9), rtol=1e-4)


def test_what_travels(monkeypatch):
    """w (6 x 5, one block of 30) sends 5 values and 5 indices of 5 bits; b and scale go whole."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    sent = [x for x in composition.wire(demo(0.1, AXIS, k=5)) if x[1] != "metrics"]
    assert sorted((part, shape, dtype) for _, part, shape, dtype in sent) == [
        ("dense", (6,), "float32"),
        ("indices", (4,), "uint8"),
        ("values", (5,), "float32"),
    ]
    assert any("demo: 2 leaves stay dense (no block has more than k=5" in line for line in lines)


def test_trains():
    """Least squares over 20 x 12 weights with an eighth of the coefficients."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(20, 12))
    loss = lambda w, batch, key: jnp.mean((batch @ (w - jnp.asarray(teacher, jnp.float32))) ** 2)
    tx = demo(optax.linear_schedule(0.1, 0.0, 150), AXIS, k=8, chunk=8)
    step = jaxcomm.make_train_step(loss, tx, axis_name=AXIS, simulate=4)
    state = step.init(jnp.zeros((20, 12)), jax.random.key(0))
    losses = []
    for _ in range(150):
        state, metrics = step(state, rng.normal(size=(16, 20)).astype(np.float32))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.01 * losses[0]


def test_after_an_average_over_another_axis():
    """Along the other axis the messages may differ, says their type."""
    chain = optax.chain(jaxcomm.average("chips"), demo(0.1, "hosts", k=3, chunk=4))
    step = jaxcomm.make_train_step(
        composition.loss_fn, chain, axis_name=("chips", "hosts"), simulate=(2, 3)
    )
    state = step.abstract_state(composition.PARAMS, jax.random.key(0))
    assert state.opt_state[1].momentum["w"].shape == (6, 6, 5)


@pytest.mark.slow
def test_composes():
    composition.check_all(
        lambda: demo(0.01, AXIS, k=3, chunk=4, weight_decay=0.1), ends=optax.identity
    )
    injected = optax.inject_hyperparams(demo, static_args=("k", "chunk"))(
        optax.linear_schedule(0.1, 0.01, 3), AXIS, k=3
    )
    composition.check(injected, simulate=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay must be in"),
        ({"k": 0}, "k must be a Python int"),
        ({"chunk": jnp.int32(4)}, "chunk must be a Python number, .* name it in static_args"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo(0.1, AXIS, **arguments)
    with pytest.raises(ValueError, match="weight_decay needs"):
        demo(0.1, AXIS, weight_decay=0.1).update(jnp.ones(2), None)


def test_integers_are_refused():
    """Their step, a sign times the rate, would be cut off."""
    tx, numbers = jaxcomm.demo(0.1, AXIS), {"i": jnp.ones((2, 3), jnp.int32)}
    update = lambda g: tx.update(g, tx.init(g))[0]
    with pytest.raises(TypeError, match=r"got int32 at \['i'\]"):
        jax.vmap(update, axis_name=AXIS)(numbers)
