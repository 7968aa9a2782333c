"""Placement is read off JAX's types: which state differs between workers, whatever the chain."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AXIS, batch, distance, host, loss_fn, mesh, tree

import jaxcomm
from jaxcomm.training.workers import Place

KEY = jax.random.key(0)
SIGN = jaxcomm.error_feedback(jaxcomm.sign(), AXIS)
MEAN = jaxcomm.average(AXIS)
ONE, EACH = {Place.REPLICATED}, {Place.PER_WORKER}


def places(tx, sync=None, params=None, **way):
    """Where every leaf of the state lives; nothing is compiled."""
    step = jaxcomm.make_train_step(
        loss_fn, tx, axis_name=AXIS, sync=sync, **(way or {"simulate": 4})
    )
    step.abstract_state(tree() if params is None else params, KEY)
    return step.places


def where(tree):
    return set(jax.tree.leaves(tree))


class Seen(NamedTuple):
    count: jax.Array  # shape=(), dtype=jnp.int32
    last: optax.Updates  # like updates


def remember(scale=1.0):
    """A transform as a user would write it: it knows nothing of workers."""

    def init_fn(params):
        return Seen(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates, state, params=None):
        del params
        updates = jax.tree.map(lambda u: scale * u, updates)
        return updates, Seen(state.count + 1, updates)

    return optax.GradientTransformation(init_fn, update_fn)


@pytest.mark.parametrize("way", [{"simulate": 4}, {"mesh": 8}, {"pmap": 4}], ids="-".join)
def test_what_stands_before_the_exchange_is_local_and_what_follows_is_shared(way):
    way = {"mesh": mesh(8)} if "mesh" in way else way
    found = places(optax.chain(optax.trace(0.9), SIGN, optax.adamw(1e-3)), **way)
    trace, error, adam = found.opt_state
    assert where(trace) == EACH
    assert where(error.error) == EACH
    assert where(error.count) == ONE
    assert where(adam) == ONE
    assert where(found._replace(opt_state=())) == ONE


def test_average_first_shares_everything():
    chain = optax.chain(MEAN, optax.trace(0.9), optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    assert where(places(chain)) == ONE


def test_both_memories_of_two_phases_are_local():
    tx = jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase")
    state = places(optax.chain(tx, optax.sgd(0.1))).opt_state[0]
    assert where((state.error, state.server_error)) == EACH
    assert where(state.count) == ONE


def test_ef21_keeps_its_own_estimate_and_shares_the_mean():
    state = places(optax.chain(jaxcomm.ef21(jaxcomm.top_k(0.1), AXIS), optax.sgd(0.1))).opt_state[0]
    assert where(state.local) == EACH
    assert where((state.mean, state.count)) == ONE


def test_local_methods():
    found = places(optax.adamw(1e-3), jaxcomm.diloco(AXIS, 4))
    assert where(found.params) == EACH
    assert where((found.opt_state[0].mu, found.opt_state[0].nu)) == EACH
    assert where(found.sync_state) == ONE  # anchor, outer momentum, clocks
    assert where((found.step, found.key)) == ONE
    assert where(found.skipped) == EACH


def test_an_outer_error_memory_is_local_beside_a_shared_anchor():
    outer = optax.chain(SIGN, optax.sgd(0.7, momentum=0.9))
    state = places(optax.sgd(0.1), jaxcomm.periodic(outer, 3)).sync_state
    assert where(state.outer[0].error) == EACH
    assert where((state.anchor, state.outer[1], state.next_sync, state.sync_step)) == ONE


def test_a_users_transform_before_and_after():
    before, _, after, _ = places(
        optax.chain(remember(), MEAN, remember(), optax.sgd(1.0))
    ).opt_state
    assert (where(before.last), where(before.count)) == (EACH, ONE)
    assert where(after) == ONE


def test_what_varies_spreads_through_several_passes():
    """A varies from step 1 on, B copies A one step later, C copies B: three passes."""

    class Chain(NamedTuple):
        a: jax.Array
        b: jax.Array
        c: jax.Array

    def update_fn(updates, state, params=None):
        del params
        return updates, Chain(optax.tree.sum(updates), state.a, state.b)

    lagged = optax.GradientTransformation(lambda _: Chain(*[jnp.zeros(())] * 3), update_fn)
    state = places(optax.chain(lagged, MEAN, optax.sgd(0.1))).opt_state[0]
    assert state == Chain(*[Place.PER_WORKER] * 3)


W_ONLY = {"w": True, "odd": [False, False], "scale": False, "shift": (False,)}
GROUPS = jax.tree.map(lambda w: "heavy" if w else "plain", W_ONLY)
inject = lambda scale: optax.inject_hyperparams(remember)(scale=scale)
decay = optax.linear_schedule(0.1, 0.0, 5)
# the chain, and which leaves of its state differ between workers: those whose name matches
CHAINS = {
    "empty": (optax.chain(optax.identity(), optax.clip(1.0), MEAN, optax.sgd(0.1)), "nothing"),
    "injected before": (optax.chain(inject(0.5), MEAN, optax.sgd(0.1)), r"^\[0\].*\.last"),
    "injected after": (optax.chain(MEAN, inject(0.5), optax.sgd(0.1)), "nothing"),
    "scheduled": (optax.chain(inject(decay), MEAN, optax.sgd(decay)), r"^\[0\].*\.last"),
    "masked before": (
        optax.chain(optax.masked(optax.trace(0.9), W_ONLY), MEAN, optax.adam(0.1)),
        r"^\[0\].*trace\['w'\]",
    ),
    "masked after": (optax.chain(MEAN, optax.masked(optax.trace(0.9), W_ONLY)), "nothing"),
    "groups": (
        optax.multi_transform(
            {
                "heavy": optax.chain(optax.trace(0.5), SIGN, optax.adam(0.1)),
                "plain": optax.chain(MEAN, optax.adam(0.1)),
            },
            GROUPS,
        ),
        r"heavy.*(trace|error)\['w'\]",
    ),
    # conditionals of Optax: both branches must be typed alike
    "if finite": (
        optax.chain(optax.apply_if_finite(optax.trace(0.5), 3), MEAN, optax.adam(0.1)),
        r"^\[0\]",  # also its clock: it counts this worker's non-finite gradients
    ),
    "if finite, twice": (
        optax.chain(
            optax.apply_if_finite(optax.trace(0.5), 3),
            optax.apply_if_finite(optax.ema(0.5), 3),
            SIGN,
            optax.adam(0.1),
        ),
        r"^\[[01]\]|error",
    ),
    "if finite, after": (
        optax.chain(MEAN, optax.apply_if_finite(optax.adam(0.1), 3)),
        "nothing",
    ),
    "sometimes": (
        optax.chain(
            optax.transforms.conditionally_transform(optax.trace(0.9), lambda step: step % 2 == 0),
            MEAN,
            optax.adam(0.1),
        ),
        r"^\[0\].*trace",
    ),
    "accumulated before": (
        optax.chain(optax.MultiSteps(optax.trace(0.9), 2).gradient_transformation(), MEAN),
        r"^\[0\]",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_states_of_optax(name):
    tx, local = CHAINS[name]
    found = places(tx)
    assert where(found.params) == ONE
    leaves = jax.tree.leaves_with_path(found.opt_state)
    for path, place in leaves:
        text = jax.tree_util.keystr(path)
        assert (place is Place.PER_WORKER) == bool(re.search(local, text)), text
    assert local == "nothing" or any(p is Place.PER_WORKER for _, p in leaves)


@pytest.mark.parametrize("way", [{"simulate": 4}, {"mesh": 4}], ids="-".join)
def test_the_state_is_stored_as_placed(way):
    """Per-worker leaves have a leading worker axis, over the devices; others are stored once."""
    way = {"mesh": mesh(4)} if "mesh" in way else way
    step = jaxcomm.make_train_step(loss_fn, CHAINS["groups"][0], axis_name=AXIS, **way)
    state = step.init(tree(), KEY)
    for _ in range(2):
        for place, leaf in zip(jax.tree.leaves(step.places), jax.tree.leaves(state)):
            wide = place is Place.PER_WORKER
            if "mesh" in way:
                assert len(leaf.sharding.device_set) == 4
                assert leaf.is_fully_replicated == (not wide)
                assert not wide or leaf.addressable_shards[0].data.shape[0] == 1
            if wide:
                assert leaf.shape[0] == 4
        state, _ = step(state, batch(0))
    error = host(state.opt_state).inner_states["heavy"].inner_state[1].error["w"]
    assert error.shape == (4, 5, 3)
    assert len(np.unique(error, axis=0)) == 4


def test_a_hyper_parameter_can_be_changed_in_the_state():
    step = jaxcomm.make_train_step(
        loss_fn,
        optax.chain(MEAN, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)),
        axis_name=AXIS,
        simulate=4,
    )
    state = step.init(tree(), KEY)
    state.opt_state[1].hyperparams["learning_rate"] = jnp.asarray(0.0)
    before = host(state.params)
    state, _ = step(state, batch(0))
    assert (host(state.params)["w"] == before["w"]).all()


@pytest.mark.parametrize(
    "method",
    [
        jaxcomm.error_feedback(jaxcomm.sign(), "slow", exchange="two_phase"),
        jaxcomm.ef21(jaxcomm.top_k(fraction=0.3), "slow"),
        jaxcomm.power_sgd(1, "slow", min_compression_rate=1.0),
    ],
    ids=["error_feedback", "ef21", "power_sgd"],
)
@pytest.mark.parametrize("way", ["simulate", "mesh"])
def test_a_memory_along_one_of_two_axes_leaves_the_parameters_shared(way, method):
    axes = ("fast", "slow")
    tx = optax.chain(jaxcomm.average("fast"), method, optax.sgd(0.1))
    make = lambda **way: jaxcomm.make_train_step(loss_fn, tx, axis_name=axes, **way)
    both = make(simulate=(2, 3)) if way == "simulate" else make(mesh=mesh((2, 3), axes))
    alone = make(simulate=(1, 3))
    state, reference = both.init(tree(), KEY), alone.init(tree(), KEY)
    assert where(both.places.params) == ONE
    assert where(both.places.opt_state) > EACH
    for i in range(4):
        rows = batch(i, 12)
        state, _ = both(state, rows)
        # the two of one fast axis together have what one has alone
        regroup = lambda x: x.reshape(2, 3, 2, -1).swapaxes(0, 1).reshape(x.shape)
        reference, _ = alone(reference, jax.tree.map(regroup, rows))
    assert distance(host(state.params), host(reference.params)) < 1e-5
    each = [x for x in jax.tree.leaves(host(state.opt_state)) if x.ndim and len(x) == 6]
    assert each
    assert all((x[:3] == x[3:]).all() for x in each)


def test_parameters_may_be_of_any_pytree_class():
    @jax.tree_util.register_pytree_node_class
    class Model:  # no __eq__ of values
        def __init__(self, w):
            self.w = w

        def tree_flatten(self):
            return (self.w,), None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls(*children)

    def make(n):
        loss = lambda model, batch, key: jnp.mean((batch - model.w) ** 2)
        tx = optax.chain(SIGN, optax.sgd(0.1))
        return jaxcomm.make_train_step(loss, tx, axis_name=AXIS, simulate=n)

    step = make(2)
    state, _ = step(step.init(Model(jnp.zeros(3)), KEY), jnp.ones((6, 3)))
    state, _ = make(3)(jaxcomm.resize_workers(state, 3), jnp.ones((6, 3)))
    assert (state.params.w > 0).all()
