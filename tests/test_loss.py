"""What a loss function may be made of, and what it may return."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import two_processes
from common import AXIS, mesh

import jaxcomm

N = 4
BATCH = np.random.default_rng(0).normal(size=(2 * N, 3)).astype(np.float32)


def recurrent(params, batch, key):
    """A scan whose carry starts as zeros, which do not vary between workers."""
    noise = 0.1 * jax.random.normal(key, (batch.shape[0],))
    cell = lambda h, x: (jnp.tanh(h * params + x + noise), None)
    return jnp.mean(jax.lax.scan(cell, jnp.zeros(batch.shape[0]), batch.T)[0] ** 2)


def branching(params, batch, key):
    """A branch that is a constant."""
    del key
    return jax.lax.cond(batch[0, 0] > 0, lambda: jnp.mean((batch - params) ** 2), lambda: 0.0)


def looping(params, batch, key):
    """A loop that starts from a constant."""
    del key
    add = lambda carry: (carry[0] + jax.lax.stop_gradient(params), carry[1] + 1)
    return jnp.mean(batch) * params * jax.lax.while_loop(lambda c: c[1] < 3, add, (0.0, 0))[0]


def train(loss_fn, steps=3, sync=None, **where):
    tx = optax.sgd(0.3) if sync else optax.chain(jaxcomm.average(AXIS), optax.sgd(0.3))
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, sync=sync, **where)
    state = step.init(jnp.float32(0.3), jax.random.key(0))
    jaxcomm.traffic(step, state, BATCH)
    history = []
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        history.append(float(metrics["loss"]))
    return step.consensus(state), history


@pytest.mark.parametrize("loss_fn", [recurrent, branching, looping])
@pytest.mark.parametrize("sync", [None, jaxcomm.local_sgd(AXIS, 2), jaxcomm.savic(AXIS, 2)])
def test_constants_may_meet_what_varies(loss_fn, sync):
    """On a mesh too, where types say what varies; with the gradients of simulated workers."""
    params, losses = train(loss_fn, sync=sync, mesh=mesh(N))
    expected, others = train(loss_fn, sync=sync, simulate=N)
    np.testing.assert_allclose(params, expected, rtol=1e-5)
    np.testing.assert_allclose(losses, others, rtol=1e-5)


def test_a_loss_that_communicates_keeps_its_types():
    """Its gradient depends on them, so that JAX's error stays."""
    together = lambda *args: jax.lax.pmean(recurrent(*args), AXIS)
    with pytest.raises(TypeError, match="carry"):
        train(together, mesh=mesh(N))
    with pytest.raises(TypeError, match="carry"):
        train(lambda *args: recurrent(*args) * jax.lax.axis_index(AXIS), mesh=mesh(N))


@pytest.mark.parametrize("way", ["simulate", "mesh", "pmap"])
def test_loss_is_the_loss(way):
    """Whatever the loss function calls its metrics; they outlive the states."""
    where = {way: mesh(N) if way == "mesh" else N}
    far = lambda params, batch, key: (jnp.mean((batch - params) ** 2) + 100, {"loss": 7.0})
    assert min(train(far, **where)[1]) > 100
    tx = optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1))
    bad = lambda params, batch, key: (jnp.sum(params) + jnp.nan, {"loss": 7.0})
    step = jaxcomm.make_train_step(bad, tx, axis_name=AXIS, **where)
    state, seen = step.init(jnp.zeros(3), jax.random.key(0)), []
    for _ in range(2):
        state, metrics = step(state, BATCH)
        seen.append(metrics)
    assert [int(metrics["skipped"]) for metrics in seen] == [1, 2]
    assert not np.any(state.params)


def test_meshes_of_explicit_axes():
    """As `jax.make_mesh` makes them unless told otherwise."""
    explicit = jax.make_mesh((N,), (AXIS,), devices=jax.devices()[:N])
    params, losses = train(recurrent, mesh=explicit)
    assert (float(params), losses) == (lambda x, y: (float(x), y))(*train(recurrent, mesh=mesh(N)))


def test_micro_steps_of_a_local_optimizer():
    """optax.MultiSteps as the whole optimizer, as it is in a chain; not around a mean."""
    loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)

    def run(tx):
        step = jaxcomm.make_train_step(
            loss_fn, tx, axis_name=AXIS, sync=jaxcomm.local_sgd(AXIS, 4), simulate=N
        )
        state = step.init(jnp.zeros(3), jax.random.key(0))
        for _ in range(6):
            state, _ = step(state, BATCH)
        return np.asarray(state.params)

    micro = lambda: optax.MultiSteps(optax.adam(0.1), 2)
    expected = run(optax.chain(micro(), optax.identity()))
    assert np.abs(expected).min() > 0
    np.testing.assert_array_equal(run(micro()), expected)
    with pytest.raises(ValueError, match=r"lax\.cond of its own"):
        run(optax.MultiSteps(optax.chain(jaxcomm.average(AXIS), optax.adam(0.1)), 2))


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_between_processes(background, tmp_path):
    """The recurrent loss in a program that is cut in pieces, or put together anew."""
    two_processes.run(
        f"""
import optax, jaxcomm
sys.path.insert(0, "tests")
from test_loss import BATCH, recurrent
loss_fn = lambda params, *args: sum(recurrent(p, *args) for p in params)
tx = optax.chain(jaxcomm.average("workers", bucket_bytes=4), optax.sgd(0.3))
def train(**where):
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", **where)
    state = step.init([jnp.float32(0.3), jnp.float32(0.7)], jax.random.key(0))
    for _ in range(3):
        state, metrics = step(state, BATCH)
    return [float(x) for x in (metrics["loss"], *state.params)]
real = train(mesh=mesh, background={background})
np.testing.assert_allclose(real, train(simulate=4), rtol=1e-5)
""",
        tmp_path,
    )
