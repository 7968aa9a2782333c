"""PowerSGD: exact on low rank, telescoping, two collectives, its reference in NumPy."""

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import AXIS, PARAMS

import jaxcomm
from jaxcomm.traffic import count, traffic
from jaxcomm.transforms import average, power_sgd
from jaxcomm.transforms._power_sgd import matrix_shape

N = 4
RNG = np.random.default_rng(0)
TREE = {  # two matrices of one shape, a convolution, leaves that stay dense
    "a": jnp.zeros((12, 10)),
    "b": jnp.zeros((12, 10)),
    "conv": jnp.zeros((3, 2, 4, 20)),
    "bias": jnp.zeros((10,)),
    "scale": jnp.zeros(()),
}


def gradients(steps, draw=lambda shape: RNG.normal(size=shape)):
    """Leaves (n, steps, ...)."""
    return jax.tree.map(lambda x: jnp.asarray(draw((N, steps, *x.shape)), jnp.float32), TREE)


def directions(tx, grads, tree=TREE):
    """Outputs and states after every step, leaves (n, steps, ...)."""

    def worker(grads):
        def one(state, g):
            u, state = tx.update(g, state)
            return state, (u, state)

        return jax.lax.scan(one, tx.init(tree), grads)[1]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(worker, axis_name=AXIS))(grads))


def test_matrix_shapes():
    assert matrix_shape((5,)) is None
    assert matrix_shape(()) is None
    assert matrix_shape((6, 5)) == (6, 5)
    assert matrix_shape((3, 3, 64, 128)) == (576, 128)
    assert matrix_shape((512, 8, 64)) == (512, 512)


def test_matches_the_algorithm_as_written_and_telescopes():
    tx, grads = power_sgd(2, AXIS, min_compression_rate=1.5), gradients(6)
    out, state = directions(tx, grads)
    for name in ("a", "b", "conv"):
        shape = matrix_shape(TREE[name].shape)
        g = np.asarray(grads[name], np.float64).reshape(N, -1, *shape)
        query = np.asarray(tx.init(TREE).query[name], np.float64)
        error = np.zeros((N, *shape))
        for t in range(6):
            m = g[:, t] + error
            p = np.linalg.qr((m @ query).mean(0))[0]
            own = np.swapaxes(m, 1, 2) @ p
            query, error = own.mean(0), m - p @ np.swapaxes(own, 1, 2)
            u = out[name][0, t].reshape(shape)
            np.testing.assert_allclose(u, p @ query.T, rtol=1e-3, atol=1e-4)
        last = state.error[name][:, -1].reshape(N, *shape)
        np.testing.assert_allclose(last, error, rtol=1e-3, atol=1e-4)
        sums = out[name][0].reshape(-1, *shape).sum(0) + last.mean(0)
        np.testing.assert_allclose(sums, g.mean(0).sum(0), atol=1e-4)
    for name in ("bias", "scale"):
        np.testing.assert_allclose(out[name][0], np.mean(grads[name], 0), atol=1e-6)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[-1]), (out, state.query))


@pytest.mark.parametrize(
    "exchange",
    ["gather", *(pytest.param(e, marks=pytest.mark.slow) for e in ("two_phase", "auto"))],
)
def test_compressed_factors_telescope(exchange):
    """Sum of outputs + mean error = sum of mean gradients, whatever the codec does to P and Q."""
    codec = jaxcomm.quantize(4, 16, rounding="stochastic")
    tx = power_sgd(2, AXIS, min_compression_rate=1.5, factors=codec, exchange=exchange)
    grads = gradients(8)
    out, state = directions(tx, grads)
    exact, _ = directions(power_sgd(2, AXIS, min_compression_rate=1.5), grads)
    for name in ("a", "b", "conv"):
        sent = out[name].sum(1)
        assert (sent == sent[0]).all()
        total = np.asarray(grads[name]).mean(0).sum(0)
        held = state.error[name][:, -1].mean(0)
        np.testing.assert_allclose(sent[0] + held, total, rtol=1e-4, atol=1e-4)
        assert np.abs(out[name] - exact[name]).max() > 1e-3  # it is not the float32 sum
    np.testing.assert_allclose(out["bias"], exact["bias"], rtol=1e-5, atol=1e-6)


def test_compressed_factors_are_smaller_and_dense_leaves_stay_dense():
    params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros((8,))}

    def sent(**options):
        tx = power_sgd(4, AXIS, **options)
        found = count(lambda g: tx.update(g, tx.init(g))[0], params, axis_sizes={AXIS: N})
        return sum(c.sent_bytes for c in found)

    floats = sent()
    codes = sent(factors=jaxcomm.quantize(4, 64), exchange="two_phase")
    dense = 4 * 8 * 2 * (N - 1) / N
    assert floats == 2 * 4 * 256 * 2 * (N - 1) / N + dense
    payload = jaxcomm.quantize(4, 64).payload_bytes(256 // N)
    assert codes == 2 * 2 * (N - 1) * payload + dense


def test_exact_on_low_rank_and_batched_leaves_keep_their_scale():
    """The mean has rank 1, the workers' own gradients do not; sizes differ by 1e4."""
    grads = gradients(1)
    rank_one = {name: RNG.normal(size=(12, 1)) @ RNG.normal(size=(1, 10)) for name in "ab"}
    rank_one["b"] *= 1e4
    for name, matrix in rank_one.items():
        noise = grads[name] - grads[name].mean(0)
        grads[name] = jnp.asarray(noise + matrix, jnp.float32)
    out, _ = directions(power_sgd(1, AXIS), grads)
    for name, matrix in rank_one.items():
        np.testing.assert_allclose(out[name][0, 0], matrix, rtol=1e-3, atol=1e-4)


def test_full_rank_is_the_mean():
    """Also after a step in which a leaf, or columns of one, have no gradient."""
    tx, grads = power_sgd(10**6, AXIS, min_compression_rate=0), gradients(3)
    grads["a"] = grads["a"].at[:, 0, :, 2:5].set(0)
    grads["b"] = grads["b"].at[:, 0].set(0)
    out, state = directions(tx, grads)
    for name, u in out.items():
        np.testing.assert_allclose(u[0], np.mean(grads[name], 0), rtol=1e-4, atol=1e-5)
    assert all(np.abs(e.mean(0)).max() < 1e-5 for e in jax.tree.leaves(state.error))


def test_zero_gradients_do_no_harm():
    """A leaf without gradient for a while, and one for ever."""
    late = np.arange(4).reshape(1, 4, *[1] * 2) >= 2
    grads = gradients(4)
    grads["a"], grads["b"] = grads["a"] * late, grads["b"] * 0
    out, _ = directions(power_sgd(2, AXIS), grads)
    assert all(np.isfinite(u).all() for u in out.values())
    assert not out["b"].any()
    assert not out["a"][:, :2].any()
    assert out["a"][:, 2:].any()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("factors", [None, jaxcomm.quantize(8, 16)], ids=["floats", "codes"])
def test_a_zero_gradient_does_not_end_the_search(factors, rank):
    """Only the last rows have a gradient, of rank 1; in the first step nothing has."""
    matrix = np.zeros((1, 5, 12, 10))
    matrix[:, 1:, 8:] = np.outer(RNG.normal(size=4), RNG.normal(size=10))
    grads = {"a": jnp.asarray(np.repeat(matrix, N, 0), jnp.float32)}
    tx = power_sgd(rank, AXIS, min_compression_rate=0, factors=factors)
    out, _ = directions(tx, grads, {"a": TREE["a"]})
    exact = matrix[0].sum(0)
    assert np.abs(out["a"][0].sum(0) - exact).max() < 0.05 * np.abs(exact).max()


def test_power_iteration_finds_the_best_rank():
    """Constant gradient, no feedback of old errors: Q converges to the leading singular space."""
    singular = np.diag([5.0, 4.0, 1.0, 0.5]) @ np.linalg.qr(RNG.normal(size=(10, 4)))[0].T
    matrix = np.linalg.qr(RNG.normal(size=(12, 4)))[0] @ singular
    u, s, v = np.linalg.svd(matrix)
    best = (u[:, :2] * s[:2]) @ v[:2]
    query, errors = jnp.asarray(RNG.normal(size=(10, 2))), []
    tree = {"a": jnp.zeros((12, 10))}
    tx = power_sgd(2, AXIS)
    step = jax.jit(
        lambda state: jax.vmap(
            lambda _: tx.update({"a": jnp.asarray(matrix, jnp.float32)}, state), axis_name=AXIS
        )(jnp.zeros(N))
    )
    state = tx.init(tree)
    for _ in range(8):
        out, new = step(state)
        query = new.query["a"][0]
        errors.append(np.linalg.norm(out["a"][0] - best))
        state = state._replace(query={"a": query})  # errors stay zero
    assert errors[-1] < 1e-3 < errors[0]


def test_two_collectives_and_their_bytes():
    step = jaxcomm.make_train_step(
        lambda p, batch, key: sum(jnp.sum(x) for x in jax.tree.leaves(p)) * jnp.sum(batch),
        power_sgd(2, AXIS, min_compression_rate=1.5),
        axis_name=AXIS,
        simulate=N,
    )
    state = jax.eval_shape(step.init, TREE, jax.random.key(0))
    report = traffic(step, state, jnp.zeros(N))
    sums = [c for c in report.collectives if c.part == "values"]
    rows, columns = 12 + 12 + 24, 10 + 10 + 20
    assert [c.shape for c in sums] == [(2 * rows + 11,), (2 * columns,)]
    assert [(note.where, note.leaves) for note in report.left_dense] == [
        ("power_sgd", ("['bias']", "['scale']"))
    ]
    only_dense = power_sgd(2, AXIS, min_compression_rate=1e6)
    found = count(lambda g: only_dense.update(g, only_dense.init(g))[0], TREE, axis_sizes={AXIS: N})
    assert len(found) == 1


def test_dense_start_and_fresh_queries():
    grads = gradients(4)
    tx = power_sgd(1, AXIS, start_step=2)
    out, state = directions(tx, grads)
    mean = np.mean(grads["a"], 0)
    np.testing.assert_allclose(out["a"][0, :2], mean[:2], atol=1e-6)
    assert not state.error["a"][:, :2].any()
    assert state.error["a"][:, 2:].any()
    cold, state = directions(power_sgd(1, AXIS, warm_start=False), grads)
    assert state.query is None
    sums = cold["a"][0].sum(0) + state.error["a"][:, -1].mean(0)
    np.testing.assert_allclose(sums, mean.sum(0), atol=1e-4)
    assert np.linalg.matrix_rank(cold["a"][0, 1], tol=1e-4) == 1


def test_trains_as_well_as_dense_sgd():
    """Least squares in a matrix, every worker with data of its own, rank 2 of 10."""
    target, rng = RNG.normal(size=(12, 10)), np.random.default_rng(1)
    data = jnp.asarray(rng.normal(size=(N, 400, 8, 12)), jnp.float32)

    def final(direction):
        tx = optax.chain(direction, optax.sgd(0.02, momentum=0.9))

        def worker(data):
            def one(carry, x):
                w, state = carry
                u, state = tx.update(x.T @ (x @ (w - target)) / 8, state, w)
                return (w + u, state), jnp.sum((w - target) ** 2)

            w = jnp.zeros((12, 10))
            return jax.lax.scan(one, (w, tx.init(w)), data)[1]

        return jax.jit(jax.vmap(worker, axis_name=AXIS))(data)[0]

    dense, low = final(average(AXIS)), final(power_sgd(2, AXIS, min_compression_rate=0))
    assert dense[-1] < 1e-6 * dense[0]
    assert low[-1] < 1e-4 * low[0]


def make(**options):
    return power_sgd(2, AXIS, min_compression_rate=0, **options)


@pytest.mark.slow
def test_composes():
    composition.check_all(make)
    composition.check_all(lambda: make(start_step=2))
    injected = optax.inject_hyperparams(
        power_sgd, static_args=("rank", "min_compression_rate", "seed")
    )
    tx = injected(2, AXIS, min_compression_rate=0, start_step=1)
    composition.check(optax.chain(tx, optax.sgd(0.1, momentum=0.9)), simulate=2)


def test_saved_and_resumed_and_a_nan():
    tx = optax.chain(make(), optax.sgd(0.05, momentum=0.9))
    step = jaxcomm.make_train_step(composition.loss_fn, tx, axis_name=AXIS, pmap=4, donate=False)

    def go(state, steps):
        for i in steps:
            state = step(state, composition.batch(i))[0]
        return state

    middle = go(step.init(PARAMS, jax.random.key(0)), range(2))
    copy = lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
    ends = go(middle, range(2, 4)), go(jax.tree.map(copy, middle), range(2, 4))
    jax.tree.map(np.testing.assert_array_equal, *(end._replace(key=0) for end in ends))
    x, y = composition.batch(3)
    x[1, 2] = np.nan
    skipped, metrics = step(middle, (x, y))
    jax.tree.map(np.testing.assert_array_equal, skipped.opt_state, middle.opt_state)
    assert int(metrics["skipped"]) == 1


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="rank must be a whole number, at least 1, got 0"):
        power_sgd(0, AXIS)
    with pytest.raises(ValueError, match="min_compression_rate must not be negative"):
        power_sgd(1, AXIS, min_compression_rate=-1)
    with pytest.raises(ValueError, match="start_step must not be negative"):
        power_sgd(1, AXIS, start_step=-1)
    with pytest.raises(ValueError, match="exchange must be one of"):
        power_sgd(1, AXIS, exchange="pigeon")
    with pytest.raises(TypeError, match="power_sgd: compressor must be"):
        power_sgd(1, AXIS, factors=4)
    with pytest.raises(ValueError, match=r"rank must .* name it in static_args"):
        power_sgd(jnp.int32(1), AXIS)
    with pytest.raises(ValueError, match=r"min_compression_rate must .* in static_args"):
        power_sgd(1, AXIS, min_compression_rate=jnp.float32(2.0))
