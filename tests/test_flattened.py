"""A transform of the whole tree as one vector: the same training, fewer kernels."""

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import AXIS

import jaxcomm
from jaxcomm import flattened

WAYS = pytest.mark.parametrize(
    "way", [{"simulate": 4}, {}, {"pmap": 8}], ids=["vmap", "shard_map", "pmap"]
)
ADAMW = lambda: optax.adamw(0.02, weight_decay=0.1)
CHAINS = {
    "average": lambda: optax.chain(jaxcomm.average(AXIS), ADAMW()),
    "ef21": lambda: optax.chain(jaxcomm.ef21(jaxcomm.top_k(0.2), AXIS, momentum=0.5), ADAMW()),
    "two_phase": lambda: optax.chain(
        jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase"), ADAMW()
    ),
    "one_bit_adam": lambda: jaxcomm.one_bit_adam(0.02, AXIS, freeze_step=2, weight_decay=0.1),
}


def close(one, other, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CHAINS)
@WAYS
def test_trains_as_the_tree_does_with_vectors_for_memories(name, way):
    plain, flat = CHAINS[name](), flattened(CHAINS[name]())
    step, state, losses = composition.train(plain, steps=6, **way)
    flat_step, flat_state, flat_losses = composition.train(flat, steps=6, **way)
    close(flat_state.params, state.params)
    close(flat_losses, losses)
    size = sum(x.size for x in jax.tree.leaves(composition.PARAMS))
    memories = [x for x in jax.tree.leaves(flat_state.opt_state) if x.ndim and x.shape[-1] == size]
    trees = jax.tree.leaves(state.opt_state)
    assert sum(x.size for x in trees) == sum(x.size for x in jax.tree.leaves(flat_state.opt_state))
    assert len(memories) >= (name == "average") * 2 + (name != "average") * 3
    report = [
        jaxcomm.traffic(s, x, composition.batch(0)).every_step_bytes
        for s, x in ((step, state), (flat_step, flat_state))
    ]
    assert report[0] == report[1] > 0


def test_bare_communication_stays_one():
    """So that `periodic` averages by it instead of descending."""
    rules = [
        jaxcomm.periodic(outer, 2)
        for outer in (jaxcomm.average(AXIS), flattened(jaxcomm.average(AXIS)))
    ]
    ends = [composition.train(optax.sgd(0.05), simulate=4, sync=rule)[1] for rule in rules]
    close(ends[1].params, ends[0].params)


def test_dtypes_stay_and_others_are_refused():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), composition.PARAMS)
    tx = flattened(optax.chain(optax.trace(0.9), optax.scale(-0.1)))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert tx.update({}, tx.init({}))[0] == {}
    with pytest.raises(TypeError, match=r"floating-point.*\['n'\]"):
        tx.init({"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)})


def test_fewer_kernels_for_many_leaves():
    """Of 300 leaves EF21's program has less than two thirds as many fused kernels."""
    params = {f"leaf{i:03d}": jnp.ones(7) for i in range(300)}
    loss = lambda p, batch, key: sum(jnp.vdot(x, x) for x in jax.tree.leaves(p)) * batch.mean()
    kernels = []
    for wrap in (lambda tx: tx, flattened):
        tx = wrap(optax.chain(jaxcomm.ef21(jaxcomm.top_k(0.2), AXIS), optax.sgd(0.1)))
        step = jaxcomm.make_train_step(loss, tx, axis_name=AXIS, simulate=2)
        state = step.init(params, jax.random.key(0))
        text = step.lower(state, jnp.ones((2, 1))).compile().as_text()
        kernels.append(sum(" fusion(" in line for line in text.splitlines()))
    assert kernels[1] < kernels[0] * 2 / 3, kernels
