"""Gradient accumulation: the same as one large batch, and no bytes on the micro-steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm

AXIS = "workers"
CHAINS = {
    "average": lambda: jaxcomm.average(AXIS),
    "ef21": lambda: jaxcomm.ef21(jaxcomm.top_k(0.2), AXIS),
    "sign": lambda: jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase"),
}


def loss_fn(params, batch, key):
    del key
    prediction = batch["x"] @ params["w"] + params["b"]
    return jnp.mean((prediction - batch["y"]) ** 2)


def setup(tx, **way):
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, **way)
    params = {"w": jnp.full((6, 3), 0.3), "b": jnp.zeros(3)}
    return step, step.init(params, jax.random.key(0))


def batches(count, rows):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return [{"x": draw(rows, 6), "y": draw(rows, 3)} for _ in range(count)]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("way", [{"simulate": 4}, {}], ids=["vmap", "shard_map"])
def test_equals_the_large_batch_and_moves_bytes_once(name, way):
    workers = way.get("simulate", 8)
    chain = optax.chain(CHAINS[name](), optax.adam(0.1))
    step, state = setup(jaxcomm.accumulate(chain, 3, AXIS), **way)
    large, large_state = setup(chain, **way)
    micro = batches(6, 2 * workers)
    sent = []
    for batch in micro:
        report = jaxcomm.traffic(step, state, batch)
        state, metrics = step(state, batch)
        sent.append(report.step_bytes(np.asarray(metrics["branches"])))
    for group in (micro[:3], micro[3:]):
        # worker i gets its own rows of the three micro-batches
        parts = {k: [b[k].reshape(workers, 2, -1) for b in group] for k in ("x", "y")}
        rows = {k: np.concatenate(v, axis=1).reshape(6 * workers, -1) for k, v in parts.items()}
        large_state, _ = large(large_state, rows)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(large_state.params)):
        np.testing.assert_allclose(a, b, atol=2e-5)
    quiet = report.every_step_bytes  # the metrics' few bytes
    assert quiet < 100
    assert [s > quiet for s in sent] == [False, False, True] * 2
    full = jaxcomm.traffic(large, large_state, micro[0]).every_step_bytes
    assert sent[2] == full


MIXED = {
    "signum": (lambda: jaxcomm.signum(0.1, AXIS), jnp.bfloat16),
    "zero_one_adam": (lambda: jaxcomm.zero_one_adam(0.1, AXIS), jnp.float32),
    "float32 momentum": (
        lambda: optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float32),
        jnp.float32,
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_updates_keep_the_dtype_of_the_chain(name):
    """Whatever that of the gradients is."""
    make, dtype = MIXED[name]
    tx = jaxcomm.accumulate(make(), 2, AXIS)

    def worker(g):
        first, state = tx.update(g, tx.init(g), g)
        return first, tx.update(g, state, g)[0]

    g = jnp.ones((3, 4), jnp.bfloat16)
    first, second = jax.jit(jax.vmap(worker, axis_name=AXIS))(g)
    assert first.dtype == second.dtype == dtype
    assert not first.any()
    assert second.all()


def test_refuses_no_steps():
    for every in (0, 2.5, float("nan")):
        with pytest.raises(ValueError, match=f"every must be whole and at least 1, got {every}"):
            jaxcomm.accumulate(optax.sgd(0.1), every, AXIS)
    injected = optax.inject_hyperparams(jaxcomm.accumulate)(optax.sgd(0.1), 2, AXIS)
    with pytest.raises(ValueError, match=r"every must .* name it in static_args"):
        injected.init(jnp.zeros(3))
