"""Just One Byte: equal to the last bit, exact on quadratics, and the moments of its estimate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcomm.traffic import count
from jaxcomm.transforms import just_one_byte
from jaxcomm.transforms._just_one_byte import ABSENT, decode_byte, encode_byte

AXIS, D, STEPS = "workers", 10, 100
RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32), "b": jnp.zeros((2,))}
BATCH = jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)


def loss_fn(params, x, key):
    """Linear regression on targets that x gives; the key is a dropout's."""
    keep = jax.random.bernoulli(key, 0.9, x.shape)
    return jnp.mean(((x * keep) @ (params["w"] - 1.0) + params["b"] - 0.5) ** 2)


def workers(job, n):
    """A compiled step of n simulated workers on a global batch."""

    def step(state, batch):
        each = batch.reshape(n, -1, *batch.shape[1:])
        return jax.vmap(job.step, (None, 0), (None, 0), axis_name=AXIS)(state, each)

    return jax.jit(step)


def steps(step, state, number, batch=BATCH):
    """The state after so many steps, and the codes of each, (number, n, samples)."""
    codes = []
    for _ in range(number):
        state, log = step(state, batch)
        codes.append(log.codes[0])
    return state, jnp.stack(codes)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_all_machines_stay_equal_and_a_late_one_catches_up():
    """In shard_map the types prove that the parameters are replicated; bytes go alone."""
    rate = optax.linear_schedule(0.02, 0.0, 20)
    job = just_one_byte(loss_fn, AXIS, learning_rate=rate, clip=30.0, samples=2)
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    own = lambda state, batch: (lambda s, log: (s, log.codes[None], log.loss[None]))(
        *job.step(state, batch)
    )
    sharded = jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P(AXIS), P(AXIS)))
    )
    state, other = job.init(PARAMS), job.init(PARAMS)
    early, codes = steps(workers(job, 4), state, 3)
    late, more = steps(workers(job, 4), early, 5)
    for _ in range(8):
        other, sent, losses = sharded(other, BATCH)
    np.testing.assert_array_equal(sent[0], sent[3])
    assert losses.shape == (4,)
    assert_same(other, late)
    replay = jax.jit(job.replay)
    assert_same(replay(early, more), late)
    assert_same(replay(replay(state, codes), more), late)
    assert int(late.step) == 8
    assert loss_fn(late.params, BATCH, jax.random.key(0)) < loss_fn(
        PARAMS, BATCH, jax.random.key(0)
    )
    found = count(job.step, state, BATCH[:8], axis_sizes={AXIS: 4})
    assert [(c.op, c.dtype, c.shape, c.sent_bytes) for c in found] == [
        ("all-gather", "uint8", (2,), 6)
    ]


@pytest.mark.slow
def test_one_machine_of_four_samples_is_four_machines_of_one():
    job = lambda samples: just_one_byte(
        loss_fn, AXIS, learning_rate=0.01, clip=30.0, samples=samples
    )
    one, codes = steps(workers(job(4), 1), job(4).init(PARAMS), 4)
    four, other = steps(workers(job(1), 4), job(1).init(PARAMS), 4)
    assert_same(codes.reshape(4, -1), other.reshape(4, -1))
    assert_same(one, four)


def quadratic(x, target, key):
    """Gradient x - target; SPSA is exact on it."""
    del key
    return 0.5 * jnp.sum((x - target[0]) ** 2)


def spsa(x, step, **options):
    """One step of one worker at step number `step`."""
    options = {"learning_rate": 1.0, "clip": 1e3, "epsilon": 0.1, **options}
    job = just_one_byte(quadratic, AXIS, **options)
    rows = options.get("samples", 1)
    state = job.init(x)._replace(step=step)
    state, log = jax.vmap(lambda _: job.step(state, jnp.zeros((rows, D))), axis_name=AXIS)(
        jnp.zeros(1)
    )
    return state.params[0], log.codes[0, 0]


def test_scalars_are_directional_derivatives():
    """p = z . grad f on a quadratic, to the width of a level; z from the parameters' change."""
    x = jnp.asarray(np.random.default_rng(11).normal(size=D), jnp.float32)
    moved, codes = jax.jit(jax.vmap(lambda t: spsa(x, t, clip=20.0)))(jnp.arange(50))
    p = np.asarray(decode_byte(codes[:, 0], 20.0))
    ok = np.abs(p) > 0.5
    z = (x - moved)[ok] / p[ok, None]
    exact = z @ np.asarray(x)
    assert ok.sum() > 20
    assert np.abs(exact - p[ok]).max() < 20.0 / 127 + 1e-3
    assert np.abs(exact - p[ok]).max() > 1e-3  # it is rounded


def test_first_and_second_moment_of_the_estimate():
    """E p z = grad f, E ||p z||^2 = (d + 2) ||grad f||^2 (spec L.3)."""
    x = jnp.asarray(np.random.default_rng(12).normal(size=D), jnp.float32)
    moved, _ = jax.jit(jax.vmap(lambda t: spsa(x, t, clip=30.0)))(jnp.arange(20_000))
    estimates = np.asarray(x - moved, np.float64)
    squared = float(x @ x)
    bias = np.linalg.norm(estimates.mean(0) - x) / np.sqrt(squared)
    assert bias < 3 * np.sqrt((D + 1) / 20_000), bias
    np.testing.assert_allclose((estimates**2).sum(1).mean() / squared, D + 2, rtol=0.05)


def test_stable_below_two_over_d_plus_two():
    """E ||x||^2 changes by 1 - 2 lr + lr^2 (d + 2) a step (spec L.3)."""
    start = jnp.asarray(np.random.default_rng(13).normal(size=D), jnp.float32)
    many = jax.jit(
        jax.vmap(lambda t, lr: spsa(start, t, learning_rate=lr, clip=30.0)[0], (0, None))
    )
    for factor in (1.0, 3.0):
        lr = factor / (D + 2)
        x = many(jnp.arange(20_000), lr)
        rate = float(jnp.mean(jnp.sum(x**2, 1)) / jnp.sum(start**2))
        np.testing.assert_allclose(rate, 1 - 2 * lr + lr**2 * (D + 2), rtol=0.03)
        assert (rate < 1) == (factor < 2)


def test_the_byte():
    values = jnp.linspace(-2.0, 2.0, 401)
    keys = jax.random.split(jax.random.key(0), 4000)
    codes = jax.jit(jax.vmap(lambda key: encode_byte(values, 2.0, key)))(keys)
    sent = np.asarray(decode_byte(codes, 2.0))
    assert codes.dtype == jnp.uint8
    assert np.abs(sent - values).max() < 2.0 / 127 + 1e-6
    assert np.abs(sent.mean(0) - values).max() < 5 * (2.0 / 127) / 2 / np.sqrt(4000)
    odd = jnp.array([0.0, 5.0, -5.0, np.nan, np.inf])
    codes = encode_byte(odd, 2.0, keys[0])
    np.testing.assert_allclose(decode_byte(codes, 2.0), [0.0, 2.0, -2.0, 0.0, 0.0], rtol=1e-6)
    assert codes[3:].tolist() == [ABSENT, ABSENT]


def test_a_worker_with_a_nan_is_not_counted():
    job = just_one_byte(quadratic, AXIS, learning_rate=0.1, clip=30.0, epsilon=0.1)
    start = job.init(jnp.asarray(np.random.default_rng(14).normal(size=D), jnp.float32))
    batch = jnp.zeros((4, D)).at[2].set(np.nan)
    state, log = workers(job, 4)(start, batch)
    codes = log.codes[0]
    assert (np.asarray(codes[:, 0]) == ABSENT).tolist() == [False, False, True, False]
    mean = lambda k: job.replay(
        start, jnp.full((1, 4, 1), ABSENT, jnp.uint8).at[0, k].set(codes[k])
    )
    change = sum(mean(k).params - start.params for k in (0, 1, 3)) / 3
    np.testing.assert_allclose(state.params - start.params, change, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_learns_as_fast_as_with_float32_scalars():
    """Linear regression, d = 20, 4 machines x 8 samples (spec L.4): at most a tenth slower."""
    target = jnp.asarray(np.random.default_rng(15).normal(size=20), jnp.float32)
    data = jnp.asarray(np.random.default_rng(16).normal(size=(64, 20)), jnp.float32)
    loss = lambda x, a, key: 0.5 * jnp.mean((a @ (x - target)) ** 2)
    options = {"learning_rate": 0.1, "samples": 8}

    def ours(seed):
        job = just_one_byte(loss, AXIS, clip=60.0, seed=seed, **options)
        step = workers(job, 4)
        one = lambda s, _: (step(s, data)[0], loss(s.params, data, None))
        return jax.lax.scan(one, job.init(jnp.zeros(20)), None, length=STEPS)[1]

    def floats(seed):
        """The same algorithm with exact scalars."""

        def one(x, t):
            def sample(key, a):
                z = jax.random.normal(key, (20,))
                return z * jax.jvp(lambda x: loss(x, a, None), (x,), (z,))[1]

            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), t), 32)
            g = jax.vmap(sample)(keys, data.reshape(32, 2, 20)).mean(0)
            return x - options["learning_rate"] * g, loss(x, data, None)

        return jax.lax.scan(one, jnp.zeros(20), jnp.arange(STEPS))[1]

    logs = [np.log(jax.jit(jax.vmap(method))(jnp.arange(16))) for method in (ours, floats)]
    fall, exact = (np.mean(log[:, 0] - log[:, 50]) for log in logs)
    assert exact > np.log(50)
    assert 0.9 * exact < fall < 1.1 * exact
    assert (logs[0][:, -1] < logs[0][:, 0] + np.log(0.01)).all()


def test_bfloat16_parameters_keep_their_dtype():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    job = just_one_byte(loss_fn, AXIS, learning_rate=0.1, clip=30.0, epsilon=0.05)
    state, _ = steps(workers(job, 2), job.init(narrow), 2)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.params))
    assert (state.params["w"] != narrow["w"]).any()


def test_arguments_are_checked():
    make = functools.partial(just_one_byte, loss_fn, AXIS, learning_rate=0.1)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        make(clip=0.0)
    with pytest.raises(ValueError, match="epsilon must be positive, got -1"):
        make(clip=1.0, epsilon=-1.0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        make(clip=1.0, samples=0)
    for dtype in ("int32", "bool"):
        with pytest.raises(TypeError, match=rf"floating-point leaves .* {dtype} at \['n'\]"):
            make(clip=1.0).init({**PARAMS, "n": jnp.ones(3, dtype)})
    job = make(clip=1.0, samples=3)
    with pytest.raises(ValueError, match="samples=3 must divide"):
        workers(job, 4)(job.init(PARAMS), BATCH)
