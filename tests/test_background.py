"""Transfers in the background change when things happen, and no value: equal to the plain step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm.training.checkpoint import Checkpointer
from tests import common

STEPS = 23
RULES = {
    "streaming": lambda total: jaxcomm.streaming_diloco(
        common.AXIS, 6, 2, delay=2, total_steps=total
    ),
    "eager": lambda total: jaxcomm.eager_diloco(common.AXIS, 5, total_steps=total),
    "co2, two rounds, compressed": lambda total: jaxcomm.co2(
        common.AXIS,
        jaxcomm.post_local(4, 3),
        delay=2,
        communication=jaxcomm.ef21(jaxcomm.top_k(k=5), common.AXIS),
        total_steps=total,
    ),
}
WAYS = {"simulate": lambda: {"simulate": 4}, "devices": lambda: {"mesh": common.mesh(4)}}


def make(rule, way, background, total=STEPS, **options):
    return jaxcomm.make_train_step(
        common.loss_fn,
        optax.adamw(0.03),
        axis_name=common.AXIS,
        sync=RULES[rule](total),
        background=background,
        **WAYS[way](),
        **options,
    )


@pytest.mark.parametrize(
    ("rule", "way"),
    [
        ("streaming", "devices"),
        ("eager", "devices"),
        pytest.param("streaming", "simulate", marks=pytest.mark.slow),
        pytest.param("co2, two rounds, compressed", "devices", marks=pytest.mark.slow),
        pytest.param("eager", "simulate", marks=pytest.mark.slow),
        pytest.param("co2, two rounds, compressed", "simulate", marks=pytest.mark.slow),
    ],
)
def test_equal_to_the_plain_step(rule, way):
    """State, metrics and branches of every step, the last (which the plain step does) included."""
    plain, beside = (common.run(make(rule, way, b), STEPS) for b in (False, True))
    for expected, found in zip(plain[0], beside[0]):
        assert common.distance(found, expected) < 1e-6
    assert common.same(beside[0][-1].sync_state.sync_step, plain[0][-1].sync_state.sync_step)
    for expected, found in zip(plain[1], beside[1]):
        np.testing.assert_array_equal(found["branches"], expected["branches"])
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


def test_what_travels_is_on_devices_that_do_not_compute():
    step = make("streaming", "devices", True)
    state = step.init(common.tree(), jax.random.key(0))
    for i in range(4):  # fragment 0 is on its way
        state, _ = step(state, common.batch(i))
    assert int(state.sync_state.pending[0]) == 5
    where = lambda tree: {d for x in jax.tree.leaves(tree) for d in x.devices()}
    assert where(state.params) == set(jax.devices()[:4])
    assert where((state.sync_state.anchor, state.sync_state.outer)) == set(jax.devices()[4:])


@pytest.mark.parametrize("rule", ["streaming", pytest.param("eager", marks=pytest.mark.slow)])
def test_saved_with_a_transfer_in_flight(rule, tmp_path):
    """Bit for bit; and the plain step can go on from what the background saved."""
    step = make(rule, "devices", True, donate=False)
    state = step.init(common.tree(), jax.random.key(0))
    for i in range(STEPS):
        if i == 7:
            with Checkpointer(tmp_path) as checkpointer:
                checkpointer.save(i, state, data_state={})
        state, _ = step(state, common.batch(i))
    for background in (True, False):
        again = step if background else make(rule, "devices", False)
        with Checkpointer(tmp_path) as checkpointer:
            found, *_ = checkpointer.restore(again.init(common.tree(), jax.random.key(1)))
        for i in range(7, STEPS):
            found, _ = again(found, common.batch(i))
        if background:
            assert common.same(common.host(found), common.host(state))
        assert common.distance(common.host(found), common.host(state)) < 1e-6


def test_schedules_without_an_end_and_steps_used_twice():
    """The plan of the next steps goes on beyond its horizon, and starts again with a new state."""
    rule = jaxcomm.eager_diloco(common.AXIS, 400)
    loss_fn = lambda params, batch, key: jnp.sum((params - batch) ** 2)
    build = lambda background: jaxcomm.make_train_step(
        loss_fn,
        optax.sgd(0.01),
        axis_name=common.AXIS,
        sync=rule,
        simulate=2,
        background=background,
    )
    batch, plain, step = np.arange(2.0, dtype=np.float32), build(False), build(True)
    for _ in range(2):
        state = step.init(jnp.ones(1), jax.random.key(0))
        for _ in range(1210):
            state, _ = step(state, batch)
        assert int(state.sync_state.sync_step) == 3
        assert int(state.sync_state.next_sync) == 1600
    expected = plain.init(jnp.ones(1), jax.random.key(0))
    for _ in range(1210):
        expected, _ = plain(expected, batch)
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-6)


@pytest.mark.slow
def test_other_numbers_of_workers():
    """A state of 2 workers goes on with 4, as without a background."""
    final = []
    for background in (False, True):
        two = jaxcomm.make_train_step(
            common.loss_fn,
            optax.adamw(0.03),
            axis_name=common.AXIS,
            sync=RULES["streaming"](STEPS),
            mesh=common.mesh(2),
            background=background,
        )
        state = two.init(common.tree(), jax.random.key(0))
        for i in range(7):
            state, _ = two(state, common.batch(i))
        four = make("streaming", "devices", background)
        state = jaxcomm.resize_workers(state, 4)
        for i in range(7, STEPS):
            state, _ = four(state, common.batch(i))
        final.append(common.host(state))
    assert common.distance(*final) < 1e-6


def test_refusals():
    step = lambda **options: jaxcomm.make_train_step(
        common.loss_fn, optax.sgd(0.1), axis_name=common.AXIS, background=True, **options
    )
    with pytest.raises(ValueError, match="simulated ones and pmap"):
        step(simulate=2)
    for sync in (
        jaxcomm.diloco(common.AXIS, 5),
        jaxcomm.streaming_diloco(common.AXIS, 6, 2, delay=0),
    ):
        with pytest.raises(ValueError, match=r"streaming_diloco\(delay=...\), eager_diloco"):
            step(sync=sync, simulate=2)
    eager = jaxcomm.eager_diloco(common.AXIS, 5)
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=2 times"):
        step(sync=eager)
    with pytest.raises(ValueError, match="not with pmap"):
        step(sync=eager, pmap=2)
    with pytest.raises(ValueError, match="mesh of the worker axes alone"):
        step(sync=eager, mesh=common.mesh((2, 2), (common.AXIS, "model")))
