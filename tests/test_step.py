"""The train step: one table over every method, run under shard_map, pmap and vmap.

A method that joins the library joins `METHODS` by a line, and with it all tests that take a name
from there (marked slow unless it is in `QUICK`). Every run has a NaN in one worker's data at step
`BAD`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AXIS, batch, distance, host, kinds, loss_fn, mesh, run, same, tree

import jaxcomm
from jaxcomm.sync._rule import ALIKE, all_finite
from jaxcomm.training.workers import Place

STEPS, BAD, VICTIM, N = 12, 7, 1, 8
# largest |a - b| / (1 + |b|) of any leaf over 12 steps, vmap against shard_map
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.0}  # reached: 3e-6 and 0


class Method(NamedTuple):
    """A row of the table: how the method is made of a codec, and what it must be equal to."""

    tx: Callable  # codec -> the chain
    sync: Callable | None = None  # codec -> the sync rule
    codec: Any = None
    dense: Callable | None = None  # () -> (chain, rule) that it is with codec identity()
    alone: Callable | None = None  # () -> the optimizer that it is with one worker and identity()


def gradient(communication, codec=None, before=optax.identity):
    """A transform of gradients, between `before` and an optimizer."""
    end = functools.partial(optax.sgd, 0.05, momentum=0.9)
    chain = lambda middle: optax.chain(before(), middle, end())
    return Method(
        tx=lambda codec: chain(communication(codec)),
        codec=codec,
        dense=lambda: (chain(jaxcomm.average(AXIS)), None),
        alone=lambda: chain(optax.identity()),
    )


def local(rule, codec=None, dense=None, alone=True):
    """A sync rule around local Adam; `dense` is the rule with codec identity()."""
    inner = functools.partial(optax.adam, 0.02)
    return Method(
        tx=lambda codec: inner(),
        sync=rule,
        codec=codec,
        dense=(lambda: (inner(), dense())) if dense else None,
        alone=inner if alone else None,
    )


DECAY = optax.cosine_decay_schedule(0.1, 14)  # rounds of 3, 4 and 5 steps
QSR = jaxcomm.qsr(DECAY, alpha=0.18, h_base=2)
NESTEROV = functools.partial(optax.sgd, 0.7, momentum=0.9, nesterov=True)
METHODS = {
    "average": gradient(lambda _: jaxcomm.average(AXIS)),
    "sign": gradient(lambda c: jaxcomm.error_feedback(c, AXIS), jaxcomm.sign()),
    "sign_two_phase": gradient(
        lambda c: jaxcomm.error_feedback(c, AXIS, exchange="two_phase"), jaxcomm.sign()
    ),
    "ef21": gradient(lambda c: jaxcomm.ef21(c, AXIS), jaxcomm.top_k(0.2)),
    "trace_ef21": gradient(
        lambda c: jaxcomm.ef21(c, AXIS), jaxcomm.top_k(0.2), before=lambda: optax.trace(0.5)
    ),
    "econtrol": gradient(lambda c: jaxcomm.econtrol(c, AXIS, eta=0.05), jaxcomm.top_k(0.2)),
    "rand_k": gradient(lambda c: jaxcomm.compressed_average(c, AXIS), jaxcomm.rand_k(0.5)),
    "local_sgd": local(lambda _: jaxcomm.local_sgd(AXIS, 3)),
    "qsr": local(lambda _: jaxcomm.local_sgd(AXIS, QSR, total_steps=STEPS)),
    "diloco": local(lambda _: jaxcomm.diloco(AXIS, 5, total_steps=STEPS), alone=False),
    "sign_diloco": local(
        lambda c: jaxcomm.periodic(
            optax.chain(jaxcomm.error_feedback(c, AXIS), NESTEROV()), every=3
        ),
        jaxcomm.sign(),
        dense=lambda: jaxcomm.diloco(AXIS, 3),
        alone=False,
    ),
}
QUICK = {"average", "sign", "sign_two_phase", "ef21", "trace_ef21", "local_sgd", "qsr", "diloco"}
QUICK_BFLOAT16 = {"sign_two_phase", "ef21", "local_sgd"}
WAYS = {"devices": {}, "pmap": {"pmap": N}, "simulate": {"simulate": N}}


def rows(keep=lambda method: True):
    """A test for each row of the table that `keep` accepts."""
    names = [name for name, method in METHODS.items() if keep(method)]
    slow = lambda name: () if name in QUICK else pytest.mark.slow
    return pytest.mark.parametrize("name", [pytest.param(n, marks=slow(n)) for n in names])


METHOD = rows()
GRADIENT = rows(lambda method: method.sync is None)
LOCAL = rows(lambda method: method.sync is not None)


class Run(NamedTuple):
    step: Any  # a TrainStep
    states: list  # on the host, the initial one first
    metrics: list
    traces: list  # how often the loss function had been traced after each step


def make(method, codec=None, **way):
    """The step of a method; with `codec` instead of its own."""
    codec = method.codec if codec is None else codec
    sync = method.sync(codec) if method.sync else None
    return jaxcomm.make_train_step(loss_fn, method.tx(codec), axis_name=AXIS, sync=sync, **way)


@functools.cache
def trajectory(name, way, dtype) -> Run:
    """`STEPS` steps; in step `BAD` one worker's batch holds a NaN."""
    method, count = METHODS[name], [0]

    def counted(*args):
        count[0] += 1
        return loss_fn(*args)

    sync = method.sync(method.codec) if method.sync else None
    step = jaxcomm.make_train_step(
        counted, method.tx(method.codec), axis_name=AXIS, sync=sync, **WAYS[way]
    )
    state = step.init(tree(jnp.dtype(dtype)), jax.random.key(3))
    states, metrics, traces = [host(state)], [], []
    for i in range(STEPS):
        data = batch(i)
        if i == BAD:
            data["x"][2 * VICTIM] = np.nan  # a worker has two rows
        state, seen = step(state, data)
        states.append(host(state))
        metrics.append(host(seen))
        traces.append(count[0])
    return Run(step, states, metrics, traces)


def with_dtypes(names):
    """(method, dtype), slow but for the quick ones; bfloat16 quick only for those named."""
    quick = [(name, "float32") for name in QUICK] + [(name, "bfloat16") for name in names]
    cases = [(name, dtype) for name in METHODS for dtype in TOLERANCE]
    slow = lambda case: () if case in quick else pytest.mark.slow
    return pytest.mark.parametrize(
        ("name", "dtype"), [pytest.param(*case, marks=slow(case)) for case in cases]
    )


@with_dtypes(QUICK_BFLOAT16)
def test_simulated_workers_follow_the_real_ones(name, dtype):
    real, simulated = (trajectory(name, way, dtype) for way in ("devices", "simulate"))
    reached = max(map(distance, real.states, simulated.states))
    print(f"{name} {dtype}: {reached:.1e}")
    assert reached <= TOLERANCE[dtype]
    check_metrics(real, simulated)


@with_dtypes(())
def test_pmap_is_shard_map_to_the_last_bit(name, dtype):
    one, other = (trajectory(name, way, dtype) for way in ("devices", "pmap"))
    assert all(map(same, one.states, other.states))
    check_metrics(one, other)


def check_metrics(one, other):
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a.keys() == b.keys()
        assert (a["branches"] == b["branches"]).all()
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@METHOD
def test_shapes_and_dtypes_stay_and_nothing_is_traced_again(name, way):
    quick = way != "pmap" and name in QUICK_BFLOAT16
    for dtype in TOLERANCE if quick else ("float32",):
        found = trajectory(name, way, dtype)
        assert all(kinds(s) == kinds(found.states[0]) for s in found.states)
        assert all(x.dtype == dtype for x in jax.tree.leaves(found.states[-1].params))
        # once, and not again (a rule's first meeting included)
        assert found.traces == [found.traces[0]] * STEPS
        assert found.metrics[5]["loss"] < found.metrics[0]["loss"]


@pytest.mark.parametrize("way", WAYS)
@GRADIENT
def test_replicas_stay_one_and_a_nan_is_skipped_by_all(name, way):
    found = trajectory(name, way, "float32")
    places = found.step.places
    assert set(jax.tree.leaves(places.params)) == {Place.REPLICATED}
    before, after = found.states[BAD], found.states[BAD + 1]
    assert same(after._replace(step=before.step, skipped=before.skipped), before)
    assert (after.step, after.skipped) == (BAD + 1, 1)
    assert math.isnan(found.metrics[BAD]["loss"])
    assert [int(m["skipped"]) for m in found.metrics] == [0] * BAD + [1] * (STEPS - BAD)
    assert found.states[-1].skipped == 1


@pytest.mark.parametrize("way", WAYS)
@LOCAL
def test_a_nan_is_skipped_by_the_worker_that_saw_it(name, way):
    found = trajectory(name, way, "float32")
    before, after = found.states[BAD], found.states[BAD + 1]
    assert before.sync_state.sync_step == after.sync_state.sync_step  # in the midst of a round
    assert after.skipped.tolist() == [int(i == VICTIM) for i in range(N)]
    kept = lambda i: same(*(jax.tree.map(lambda x: x[i], s.params) for s in (before, after)))
    assert [kept(i) for i in range(N)] == [i == VICTIM for i in range(N)]
    for old, new in zip(*map(jax.tree.leaves, (before.opt_state, after.opt_state))):
        assert old[VICTIM].tobytes() == new[VICTIM].tobytes()
    assert found.metrics[-1]["skipped"] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.states[-1]))


@LOCAL
def test_replicas_meet_when_the_rule_says(name):
    rule = {"local_sgd": 3, "qsr": QSR, "diloco": 5, "sign_diloco": 3}[name]
    meetings = jaxcomm.sync_steps(rule, STEPS)
    if name == "qsr":
        assert meetings == [3, 7, 12]
    for way in WAYS:
        states = trajectory(name, way, "float32").states
        counts = [int(s.sync_state.sync_step) for s in states]
        assert [t for t in range(1, STEPS + 1) if counts[t] > counts[t - 1]] == meetings
        for t in range(1, STEPS + 1):
            w = states[t].params["w"]
            assert (w == w[0]).all() == (t in meetings)


@METHOD
def test_collectives_are_conditional_only_for_sync_rules(name):
    found = trajectory(name, "devices", "float32")
    traffic = jaxcomm.traffic(found.step, found.step.abstract_state(tree(), KEY), batch(0))
    conditional = [bool(c.when) for c in traffic.collectives]
    assert conditional
    assert all(conditional) if METHODS[name].sync else not any(conditional)


KEY = jax.random.key(0)
GRADIENT_OF_LOSS = jax.jit(jax.grad(loss_fn))


@rows(lambda method: method.dense and method.codec)
def test_without_compression_it_is_the_dense_method(name):
    method = METHODS[name]
    tx, sync = method.dense()
    mine, _ = run(make(method, jaxcomm.identity(), simulate=4), 6)
    dense = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, sync=sync, simulate=4)
    theirs, _ = run(dense, 6)
    assert distance([s.params for s in mine], [s.params for s in theirs]) < 2e-6


@rows(lambda method: method.alone)
def test_one_worker_is_plain_optax(name):
    method = METHODS[name]
    step = make(method, jaxcomm.identity() if method.codec else None, simulate=1)
    states, _ = run(step, 6)
    alone = lambda x: x[0] if method.sync else x  # of the leading worker axis
    mine = [jax.tree.map(alone, s.params) for s in states]
    tx, params = method.alone(), tree()
    state = tx.init(params)
    theirs = [params]
    for i in range(6):
        updates, state = tx.update(GRADIENT_OF_LOSS(params, batch(i), None), state, params)
        params = optax.apply_updates(params, updates)
        theirs.append(params)
    assert distance(mine, host(theirs)) < 2e-6


# What does not depend on the method.

TX = optax.chain(
    jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase"), optax.adam(0.01)
)


def test_metrics_are_means_over_the_workers():
    def with_aux(params, data, key):
        return loss_fn(params, data, key), {"first": data["x"][0, 0], "vector": data["x"][0]}

    for sync in (None, jaxcomm.local_sgd(AXIS, 2)):
        tx = optax.sgd(0.1) if sync else optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1))
        step = jaxcomm.make_train_step(with_aux, tx, axis_name=AXIS, sync=sync, simulate=4)
        _, metrics = step(step.init(tree(), KEY), batch(0))
        rows = batch(0)["x"].reshape(4, 4, 5)  # worker i has the i-th contiguous quarter
        np.testing.assert_allclose(metrics["first"], rows[:, 0, 0].mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["vector"], rows[:, 0].mean(0), rtol=1e-6)
        parts = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch(0)) for i in range(4)]
        losses = [float(loss_fn(tree(), part, None)) for part in parts]
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)


def test_keys_differ_by_worker_and_step_and_agree_between_the_ways():
    def draw(params, data, key):
        return jnp.sum(params) * 0, jax.nn.one_hot(data[0], 8) * jax.random.uniform(key)

    tx, seen = optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1)), {}
    for name, way in WAYS.items():
        step = jaxcomm.make_train_step(draw, tx, axis_name=AXIS, **way)
        state = step.init(jnp.zeros(2), KEY)
        state, first = step(state, jnp.arange(8))
        state, second = step(state, jnp.arange(8))
        seen[name] = np.concatenate([first["aux"], second["aux"]])
        assert len(np.unique(seen[name])) == 16
    assert same(seen["devices"], seen["pmap"])
    assert same(seen["devices"], seen["simulate"])


def test_raw_keys_are_as_good_as_typed_ones():
    step = jaxcomm.make_train_step(loss_fn, TX, axis_name=AXIS, simulate=2)
    typed, raw = (step.init(tree(), make(5)) for make in (jax.random.key, jax.random.PRNGKey))
    assert same(host(typed), host(raw))


@pytest.mark.slow
def test_two_axes_are_one_axis_of_their_product():
    """In both hops of a random codec: the order of workers, chunks and keys is row-major."""
    names, found = ("pods", "hosts"), []
    codec = jaxcomm.quantize(bits=4, block_size=8, rounding="stochastic")
    for axis_name, way in [
        (AXIS, {"mesh": mesh(8)}),
        (names, {"mesh": mesh((2, 4), names)}),
        (names, {"simulate": (2, 4)}),
    ]:
        middle = jaxcomm.error_feedback(codec, axis_name, exchange="two_phase")
        tx = optax.chain(middle, optax.sgd(0.05))
        step = jaxcomm.make_train_step(loss_fn, tx, axis_name=axis_name, **way)
        found.append(run(step, 4)[0])
    assert all(map(same, found[0], found[1]))
    assert max(map(distance, found[0], found[2])) <= TOLERANCE["float32"]


def test_other_axes_of_the_mesh_are_left_alone():
    step = make(METHODS["sign_two_phase"], mesh=mesh((8, 1), (AXIS, "model")))
    states, _ = run(step, 3, key=jax.random.key(3))
    assert all(map(same, states, trajectory("sign_two_phase", "devices", "float32").states))
    pair = make(METHODS["average"], mesh=mesh((2, 2), ("model", AXIS)))
    assert int(run(pair, 1)[0][-1].step) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_callers_arrays_survive_and_states_are_donated(way):
    params, key = tree(), jax.random.key(1)
    before = host(params)
    step = trajectory("ef21", way, "float32").step
    first = step.init(params, key)
    state, _ = step(first, batch(0))
    step(state, batch(1))
    assert same(host(params), before)
    jax.random.key_data(key).block_until_ready()
    assert first.params["w"].is_deleted()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere all of it is reused")
def test_on_cpu_a_state_is_freed_and_a_lowered_step_leaves_it():
    rule = jaxcomm.local_sgd(AXIS, 2)
    step = jaxcomm.make_train_step(loss_fn, optax.adam(0.1), axis_name=AXIS, sync=rule, simulate=2)
    state = step.init(tree(), KEY)
    copies = jax.tree.map(jnp.copy, state)
    again = step.lower(state, batch(0)).compile()(copies, batch(0))[0]
    assert not any(x.is_deleted() for x in jax.tree.leaves(copies))
    new, _ = step(state, batch(0))
    old = state.params, state.opt_state, state.sync_state, state.step
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))
    assert same(host(new), host(again))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere all of it is reused")
def test_on_cpu_local_optimizers_step_in_place_and_those_that_communicate_do_not():
    """A worker that skips its step must not miss a collective."""
    rule, nan = jaxcomm.local_sgd(AXIS, 2), jax.tree.map(np.array, batch(0))
    nan["x"][0] = np.nan  # of the first worker
    for first, in_place in ((optax.identity(), True), (jaxcomm.average(AXIS), False)):
        tx = optax.chain(first, optax.adam(0.1))
        step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, sync=rule, mesh=mesh(2))
        state, _ = step(step.init(tree(), KEY), nan)
        assert step.donates_all == in_place
        assert np.asarray(state.skipped).tolist() == [1, 0 if in_place else 1]
        assert not any(np.any(x[:1]) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("simulate", [False, True])
@pytest.mark.parametrize("inner", [(), ("chips",), ("hosts",), ("hosts", "chips")])
def test_a_nan_is_skipped_by_those_that_the_optimizer_exchanges_with(inner, simulate):
    """Chips that average every gradient, hosts that meet: no one else hears of it in between."""
    names, nan = ("hosts", "chips"), jax.tree.map(np.array, batch(0))
    nan["x"][2 * 4] = np.nan  # of worker (1, 0); a worker has four rows
    way = {"simulate": (2, 2)} if simulate else {"mesh": mesh((2, 2), names)}
    tx = optax.chain(*[jaxcomm.average(inner)] * bool(inner), optax.adam(0.1))
    rule = jaxcomm.local_sgd(names, 3)
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=names, sync=rule, **way)
    state, _ = step(step.init(tree(), KEY), nan)
    at = tuple(slice(None) if name in inner else i for name, i in zip(names, (1, 0)))
    want = np.zeros((2, 2), int)
    want[at] = 1
    assert np.asarray(state.skipped).reshape(2, 2).tolist() == want.tolist()
    for x in jax.tree.leaves((state.params, state.opt_state)):
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_without_donation_a_state_can_be_used_again():
    step = jaxcomm.make_train_step(loss_fn, TX, axis_name=AXIS, donate=False, simulate=4)
    state = step.init(tree(), KEY)
    one, two = (host(step(state, batch(0))[0]) for _ in range(2))
    assert same(one, two)


@pytest.mark.parametrize(
    ("name", "way"),
    [("sign_two_phase", "devices"), ("local_sgd", "devices"), ("local_sgd", "simulate")],
)
def test_a_state_made_elsewhere_is_accepted(name, way):
    """A new step object, as after a restart, continues from the host's copy of a state."""
    found, fresh = trajectory(name, way, "float32"), make(METHODS[name], **WAYS[way])
    state = found.states[9]
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    consensus = host(fresh.consensus(state))
    want = state.params
    if name == "local_sgd":
        want = jax.tree.map(lambda x: x.mean(0), want)
    assert distance(consensus, want) < 1e-6
    for i in range(9, STEPS):
        state, _ = fresh(state, batch(i))
        assert same(host(state), found.states[i + 1])


def test_a_state_of_another_step_is_refused():
    step = make(METHODS["ef21"], simulate=4)
    other = make(METHODS["sign"], simulate=4).init(tree(), KEY)
    for wrong in (other, other._replace(params={"w": jnp.zeros(3)})):
        with pytest.raises(ValueError, match="does not belong to this step"):
            step(wrong, batch(0))


@pytest.mark.parametrize("name", ["ef21", "local_sgd"])
def test_many_seeds_in_one_program(name):
    """A simulated run is a pure function: under vmap over seeds, inside jit and scan."""
    step = make(METHODS[name], simulate=N)
    data = jax.tree.map(lambda *x: jnp.stack(x), *(batch(i) for i in range(4)))

    def train(seed):
        state = step.init(tree(), jax.random.key(seed))
        state, metrics = jax.lax.scan(step, state, data)
        return state.params, step.consensus(state), metrics["loss"], metrics["skipped"]

    params, consensus, losses, skipped = jax.jit(jax.vmap(train))(jnp.arange(3))
    one = trajectory(name, "simulate", "float32")
    for i in range(3):  # this loss draws nothing: all seeds are the same run
        mine = host(jax.tree.map(lambda x, i=i: x[i], params))
        assert distance(mine, one.states[4].params) < 1e-5
        np.testing.assert_allclose(losses[i], [m["loss"] for m in one.metrics[:4]], rtol=1e-5)
        mean = jax.tree.map(lambda x: x.mean(0), mine) if METHODS[name].sync else mine
        assert distance(host(jax.tree.map(lambda x, i=i: x[i], consensus)), mean) < 1e-6
    assert not skipped.any()


def test_weak_types_and_plain_numbers_do_not_trace_twice():
    traces = []

    def loss(params, data, key):
        traces.append(1)
        return (params["a"] - jnp.mean(data)) ** 2 + jnp.sum(params["b"]) ** 2

    for way in ({"simulate": 2}, {"mesh": mesh(2)}):
        tx = optax.chain(jaxcomm.average(AXIS), optax.adam(0.1))
        step = jaxcomm.make_train_step(loss, tx, axis_name=AXIS, **way)
        state = step.init({"a": 1.0, "b": np.ones((2,), np.float32)}, KEY)
        traces.clear()
        for _ in range(3):
            state, _ = step(state, np.ones((2,), np.float32))
        assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("leaf", ["first", "last", "other", "scalar"])
def test_a_bad_number_is_seen_in_every_leaf(leaf, dtype):
    """Of many that are alike, and of one like no other; numbers beyond float32 are finite."""
    with jax.enable_x64(dtype == "float64"):
        good = {f"alike{i}": jnp.ones((5, 2), dtype) for i in range(2 * ALIKE + 1)}
        good |= {"other": jnp.ones((2, 5), dtype), "scalar": jnp.asarray(1, dtype)}
        if dtype == "float64":
            good = jax.tree.map(lambda x: 1e300 * x, good)
        good["count"] = jnp.asarray(3)
        assert all_finite(good)
        assert all_finite({})
        name = {"first": "alike0", "last": f"alike{2 * ALIKE}"}.get(leaf, leaf)
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            last = good[name].reshape(-1).at[-1].set(bad).reshape(good[name].shape)
            assert not all_finite({**good, name: last})
