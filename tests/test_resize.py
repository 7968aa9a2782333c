"""resize_workers: 2 -> 4 -> 1 -> 3 workers for every transform and sync rule, leaf by leaf."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AXIS, batch, distance, host, kinds, loss_fn, mesh, same, tree

import jaxcomm
from configs import digits_dense
from experiments.tasks import make_task
from experiments.train import train_and_evaluate
from jaxcomm.training import resize
from jaxcomm.training.checkpoint import Checkpointer, CheckpointError
from jaxcomm.training.local_checkpoint import LocalCheckpointer
from jaxcomm.training.loop import train_loop
from jaxcomm.training.metrics import MetricsLogger
from jaxcomm.training.step import TrainStep
from jaxcomm.training.workers import Place

KEY = jax.random.key(0)
PATH = (2, 4, 1, 3)
ROWS, STEPS = 24, 4
SIGN, TOP = jaxcomm.sign(), jaxcomm.top_k(0.3)
RANDOM = jaxcomm.quantize(4, rounding="stochastic")
NESTEROV = functools.partial(optax.sgd, 0.5, momentum=0.5, nesterov=True)
two_phase = lambda: jaxcomm.error_feedback(SIGN, AXIS, exchange="two_phase")

# constructors, called with the number of workers
EXCHANGES = {
    "average": lambda n: jaxcomm.average(AXIS),
    "rand_k": lambda n: jaxcomm.compressed_average(jaxcomm.rand_k(0.5), AXIS),
    "error_feedback": lambda n: jaxcomm.error_feedback(SIGN, AXIS),
    "two_phase": lambda n: two_phase(),
    "ef21": lambda n: jaxcomm.ef21(TOP, AXIS),
    "ef21_sgd2m": lambda n: jaxcomm.ef21(TOP, AXIS, momentum=0.5, double_momentum=True),
    "ef21_pp_bc": lambda n: jaxcomm.ef21(TOP, AXIS, participation=0.7, downlink=TOP),
    "ef21_w": lambda n: jaxcomm.ef21(TOP, AXIS, weight=weights(n)),
    "ef21_plus": lambda n: jaxcomm.ef21_plus(TOP, AXIS),
    "econtrol": lambda n: jaxcomm.econtrol(TOP, AXIS, eta=0.05),
    "dgc": lambda n: jaxcomm.deep_gradient_compression(0.2, AXIS, momentum=0.5),
    "power_sgd": lambda n: jaxcomm.power_sgd(1, AXIS),
    "majority_vote": lambda n: jaxcomm.majority_vote(AXIS),
    "trace_ef21": lambda n: optax.chain(optax.trace(0.5), jaxcomm.ef21(TOP, AXIS)),
    "flattened": lambda n: jaxcomm.flattened(jaxcomm.ef21(TOP, AXIS)),
    "masked": lambda n: optax.chain(*halves(two_phase(), jaxcomm.average(AXIS))),
}
OPTIMIZERS = {
    "one_bit_adam": lambda n: jaxcomm.one_bit_adam(0.02, AXIS, freeze_step=2),
    "zero_one_adam": lambda n: jaxcomm.zero_one_adam(0.02, AXIS, sync_every=3),
    "one_bit_lamb": lambda n: jaxcomm.one_bit_lamb(0.02, AXIS, freeze_step=2),
    "demo": lambda n: jaxcomm.demo(0.02, AXIS),
    "signum": lambda n: jaxcomm.signum(0.02, AXIS),
    "accumulate": lambda n: jaxcomm.accumulate(optax.chain(two_phase(), optax.sgd(0.05)), 3, AXIS),
}
RULES = {
    "local_sgd": lambda n: jaxcomm.local_sgd(AXIS, 3),
    "averaged_moments": lambda n: jaxcomm.local_sgd(AXIS, 3, moments=jaxcomm.average(AXIS)),
    "diloco": lambda n: jaxcomm.diloco(AXIS, 3),
    "fed_opt": lambda n: jaxcomm.fed_opt(AXIS, 3, optax.adam(0.02)),
    "two_phase_diloco": lambda n: jaxcomm.periodic(optax.chain(two_phase(), NESTEROV()), 3),
    "ef21_diloco": lambda n: jaxcomm.periodic(optax.chain(jaxcomm.ef21(TOP, AXIS), NESTEROV()), 3),
    "sparse_loco": lambda n: jaxcomm.sparse_loco(AXIS, 3, density=0.3),
    "streaming": lambda n: jaxcomm.streaming_diloco(AXIS, 5, 2, delay=2),
    "eager": lambda n: jaxcomm.eager_diloco(AXIS, 3, rounds=2),
    "co2": lambda n: jaxcomm.co2(AXIS, 3),
    "slowmo": lambda n: jaxcomm.slowmo(AXIS, 3),
    "scaffold": lambda n: jaxcomm.scaffold(AXIS, 3, 0.02),
    "scallion": lambda n: jaxcomm.scallion(RANDOM, AXIS, 3, 0.02),
    "scafcom": lambda n: jaxcomm.scafcom(TOP, AXIS, 3, 0.02),
    "savic": lambda n: jaxcomm.savic(AXIS, 3, scaling="local"),
    "flasc": lambda n: jaxcomm.flasc(TOP, AXIS, 3, download=jaxcomm.top_k(0.8)),
    "single_merge": lambda n: jaxcomm.single_merge(AXIS, 3, total_steps=100, probability=0.5),
    "weight_average": lambda n: jaxcomm.weight_average(jaxcomm.local_sgd(AXIS, 3), last=2),
}
NAMES = [*EXCHANGES, *OPTIMIZERS, *RULES]
QUICK = {"eager"}
QUICK_TABLE = {"ef21_w", "ef21_plus", "econtrol", "masked", "dgc", "one_bit_adam", "accumulate"}
QUICK_TABLE |= {"two_phase_diloco", "streaming", "eager", "scafcom", "savic", "weight_average"}


def weights(n):
    return jnp.arange(1.0, n + 1) / (n * (n + 1) / 2)


def halves(one, other):
    first = {"w": True, "odd": [True, True], "scale": False, "shift": (False,)}
    return optax.masked(one, first), optax.masked(other, jax.tree.map(lambda x: not x, first))


def make(name, n, **way):
    """The step of a method for n workers."""
    sync = RULES[name](n) if name in RULES else None
    if name in EXCHANGES:
        tx = optax.chain(EXCHANGES[name](n), optax.sgd(0.02, momentum=0.5))
    else:
        plain = {"scaffold", "scallion", "scafcom", "savic"}
        inner = optax.sgd(0.02) if name in plain else optax.adam(0.02)
        tx = OPTIMIZERS[name](n) if name in OPTIMIZERS else inner
    way = way or {"simulate": n}
    return jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, sync=sync, **way)


def filled(step, params=None, seed=0):
    """A state with something in every leaf; what is beyond the end of a vector is zero."""
    rng, state = np.random.default_rng(seed), step.abstract_state(params or tree(), KEY)
    size = sum(x.size for x in jax.tree.leaves(params or tree()))

    def leaf(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return KEY
        if jnp.issubdtype(x.dtype, jnp.floating):
            values = rng.normal(size=x.shape)
            if jax.tree_util.keystr(path).endswith("server_error"):
                values = values.reshape(-1)
                values[size if values.size >= size else -1 :] = 0  # a part of the tree: the last
                values = values.reshape(x.shape)
            return jnp.asarray(values, x.dtype)
        return jnp.full(x.shape, 3, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, state)


def flat(state):
    return {jax.tree_util.keystr(k): x for k, x in jax.tree.leaves_with_path(host(state))}


def check_rules(old, new, places):
    """Every leaf of a resized state against the table in the docstring of resize_workers."""
    before, after, places = flat(old), flat(new), flat(jax.tree.map(lambda p: p.value, places))
    assert before.keys() == after.keys()
    for path, x in before.items():
        y, wide = after[path], lambda z: np.asarray(z, np.float64)
        assert x.dtype == y.dtype, path
        if path.endswith("server_error"):
            size = min(x.size, y.size)
            np.testing.assert_array_equal(x.reshape(-1)[:size], y.reshape(-1)[:size])
            assert not x.reshape(-1)[size:].any()
            assert not y.reshape(-1)[size:].any()
        elif path == ".skipped":
            assert x.sum() == y.sum()
            assert np.ptp(y) <= 1
        elif ".local" in path and path.replace(".local", ".error") not in before:  # EF21
            g = before[path.replace(".local", ".mean")]
            assert all((row == g).all() for row in y), path
        elif path.endswith("everyone") or places[path] == "per worker":
            mean = wide(x).mean(0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]
            for row in y:
                np.testing.assert_allclose(wide(row), mean, rtol=0.01 if x.itemsize < 4 else 3e-7)
        else:
            np.testing.assert_array_equal(x, y, err_msg=path)


def methods(quick):
    """A test for each method, slow but for the quick ones."""
    slow = lambda name: () if name in quick else pytest.mark.slow
    return pytest.mark.parametrize("name", [pytest.param(n, marks=slow(n)) for n in NAMES])


@methods(QUICK_TABLE)
def test_every_leaf_follows_the_table(name):
    step = make(name, PATH[0])
    state = filled(step)
    for n in PATH[1:]:
        new = jaxcomm.resize_workers(state, n)
        check_rules(state, new, step.places)
        state = new
    like = make(name, n).abstract_state(tree(), KEY)
    assert jax.tree.structure(like) == jax.tree.structure(state)
    assert kinds(like) == kinds(state)


@methods(QUICK)
def test_training_goes_on_and_descends(name):
    state, consensus, losses, done = None, None, [], 0
    for n in PATH:
        step = make(name, n)
        if state is None:
            state = step.init(tree(), KEY)
        else:
            state = jaxcomm.resize_workers(state, n)
            assert distance(host(step.consensus(state)), consensus) < 1e-6
            assert int(state.step) == done
        for _ in range(STEPS):
            state, metrics = step(state, batch(0, ROWS))
            losses.append(float(metrics["loss"]))
        consensus, done = host(step.consensus(state)), done + STEPS
        assert kinds(state) == kinds(step.abstract_state(tree(), KEY))
    print(name, np.round(losses, 3))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_the_mean_of_ef21_estimates_is_what_all_agreed_on():
    """After real steps, with and without weights; the identity codec then is the dense method."""
    data = batch(0, ROWS)
    for options in ({}, {"weight": weights(4)}):
        tx = optax.chain(jaxcomm.ef21(TOP, AXIS, **options), optax.sgd(0.02))
        step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, simulate=4)
        state = step.init(tree(), KEY)
        for _ in range(3):
            state, _ = step(state, data)
        ef21 = jaxcomm.resize_workers(state, 3).opt_state[0]
        w = np.full(4, 0.25) if not options else np.asarray(weights(4))
        mean = lambda x, w: np.tensordot(w, np.asarray(x, np.float64), 1)
        for g, old, new in zip(
            *(jax.tree.leaves(x) for x in (ef21.mean, state.opt_state[0].local, ef21.local))
        ):
            np.testing.assert_allclose(mean(old, w), g, atol=1e-6)
            np.testing.assert_allclose(mean(new, np.asarray(weights(3))), g, rtol=1e-6)


def test_equal_replicas_stay_equal_to_the_last_bit():
    """At a sync boundary; in a narrow dtype, and with a count of skipped steps that is kept."""
    step = make("local_sgd", 6)
    state = filled(step, tree(jnp.bfloat16))
    same_params = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), state.params)
    state = state._replace(params=same_params, skipped=jnp.asarray([0, 5, 0, 1, 0, 1], jnp.int32))
    for n in (5, 7):
        new = jaxcomm.resize_workers(state, n)
        for x, y in zip(*(jax.tree.leaves(host(s.params)) for s in (state, new))):
            assert x.dtype == y.dtype == jnp.bfloat16
            assert all(row.tobytes() == x[0].tobytes() for row in y)
        assert sorted(np.asarray(new.skipped)) == sorted([2] * 2 + [1] * 3 if n == 5 else [1] * 7)


def test_an_exchange_that_changes_with_the_number_loses_nothing():
    params = {"a": jnp.zeros(150_001), "b": jnp.zeros((50_000, 2))}
    tx = optax.chain(jaxcomm.error_feedback(SIGN, AXIS, exchange="auto"), optax.sgd(0.1))
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, simulate=8)
    state = filled(step, params)
    old, two = state.opt_state[0], jaxcomm.resize_workers(state, 2)
    assert old.server_error is not None
    assert two.opt_state[0].server_error is None
    waiting = lambda memory: np.concatenate(
        [np.asarray(x, np.float64).mean(0).reshape(-1) for x in jax.tree.leaves(memory.error)]
    )
    server = np.asarray(old.server_error).reshape(-1)[:250_001]
    np.testing.assert_allclose(waiting(two.opt_state[0]), waiting(old) + server, atol=1e-6)
    again = jaxcomm.resize_workers(two, 8).opt_state[0]
    assert not np.asarray(again.server_error).any()
    np.testing.assert_allclose(waiting(again), waiting(two.opt_state[0]), atol=1e-6)


def test_a_vector_shorter_than_the_workers_keeps_its_positions():
    """d = 1 and d = 5: chunks look alike for several numbers of workers."""
    for d in (1, 5):
        tx = optax.chain(two_phase(), optax.sgd(0.1))
        loss = lambda x, data, key: jnp.sum(x**2)
        step = jaxcomm.make_train_step(loss, tx, axis_name=AXIS, simulate=3)
        state = step.init(jnp.ones(d), KEY)
        memory = np.zeros((3, -(-d // 3)), np.float32)
        memory.reshape(-1)[:d] = np.arange(1, d + 1)
        wrong = state.opt_state[0]._replace(server_error=jnp.asarray(memory))
        state = state._replace(opt_state=(wrong, *state.opt_state[1:]))
        for n in (4, 1, 7, 2):
            state = jaxcomm.resize_workers(state, n)
            found = np.asarray(state.opt_state[0].server_error).reshape(-1)
            np.testing.assert_array_equal(found[:d], np.arange(1, d + 1))
            assert not found[d:].any()


def test_two_axes():
    names = ("pods", "hosts")
    tx = optax.chain(jaxcomm.error_feedback(SIGN, names, exchange="two_phase"), optax.sgd(0.02))
    make = lambda sizes: jaxcomm.make_train_step(loss_fn, tx, axis_name=names, simulate=sizes)
    step = make((2, 4))
    state = filled(step)
    new = jaxcomm.resize_workers(state, (2, 3))
    check_rules(state, new, step.places)
    assert same(host(new), host(jaxcomm.resize_workers(state, 6)))
    make((2, 3)).trace(new, batch(0, ROWS))
    with pytest.raises(ValueError, match=r"n must be .* or 2 of them, got \(2, 3, 1\)"):
        jaxcomm.resize_workers(state, (2, 3, 1))


def test_an_exchange_that_stays_with_two_phases_is_cut_anew(tmp_path):
    """One worker would need no second memory, both of these do."""
    params, data = {"w": jnp.zeros(300_001)}, jnp.zeros((ROWS, 1))
    tx = optax.chain(jaxcomm.error_feedback(SIGN, AXIS, exchange="auto"), optax.sgd(0.1))
    loss = lambda x, data, key: jnp.sum(x["w"] ** 2) + jnp.sum(data)
    make = lambda n: jaxcomm.make_train_step(loss, tx, axis_name=AXIS, simulate=n)
    step, six = make(8), make(6)
    state = filled(step, params)
    new = jaxcomm.resize_workers(state, 6)
    check_rules(state, new, step.places)
    six.trace(new, data)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, data_state=None)
        found = checkpointer.restore(six.init(params, KEY), resize=True)[0]
    assert same(host(found), host(new))


def test_a_state_that_cannot_be_resized_on_restore_is_a_checkpoint_error(tmp_path, monkeypatch):
    state, like = filled(make("two_phase", 4)), make("two_phase", 2).init(tree(), KEY)
    monkeypatch.setattr(resize, "chunk_size", lambda size, count: size)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, data_state=None)
        with pytest.raises(CheckpointError, match="for which there is no rule"):
            checkpointer.restore(like, resize=True)


FAST_SLOW = ("fast", "slow")


def on_two_axes(sizes, exchange=None, average="fast"):
    """Dense along one axis, compressed along the other."""
    exchange = exchange or jaxcomm.error_feedback(SIGN, "slow", exchange="two_phase")
    tx = optax.chain(jaxcomm.average(average), exchange, optax.sgd(0.02))
    return jaxcomm.make_train_step(loss_fn, tx, axis_name=FAST_SLOW, simulate=sizes)


@pytest.mark.parametrize(("sizes", "axis"), [((3, 2), 0), ((3, 2), 1), ((1, 3), 1)])
def test_chunks_along_one_of_two_axes(sizes, axis):
    """Cut anew along it, the same along the other one; (2, 2) could be either."""
    along, other = FAST_SLOW[axis], FAST_SLOW[1 - axis]
    exchange = jaxcomm.error_feedback(SIGN, along, exchange="two_phase")
    step = on_two_axes((2, 2), exchange, other)
    state, size = filled(step), sum(x.size for x in jax.tree.leaves(tree()))
    vector = np.arange(1, size + 1, dtype=np.float32)
    wide = lambda memory, sizes: np.moveaxis(memory.reshape(*sizes, -1), axis, -2)
    memory = np.pad(vector, (0, -size % 2)).reshape(2, -1)
    memory = np.moveaxis(np.stack([memory, memory]), -2, axis).reshape(4, -1)
    feedback = state.opt_state[1]._replace(server_error=jnp.asarray(memory))
    state = state._replace(opt_state=(state.opt_state[0], feedback, *state.opt_state[2:]))
    new = jaxcomm.resize_workers(state, sizes)
    for row in wide(np.asarray(new.opt_state[1].server_error), sizes):
        np.testing.assert_array_equal(row.reshape(-1)[:size], vector)
        assert not row.reshape(-1)[size:].any()
    on_two_axes(sizes, exchange, other).trace(new, batch(0, ROWS))


def test_rows_along_one_of_two_axes():
    plus = jaxcomm.ef21_plus(TOP, "slow")
    state = filled(on_two_axes((2, 4), plus))
    new = jaxcomm.resize_workers(state, (2, 3))
    rows, mean = new.opt_state[1].everyone, np.asarray(state.opt_state[1].everyone).mean(0)
    assert rows.shape[0] == 3
    np.testing.assert_allclose(rows, np.stack([mean] * 3), atol=1e-6)
    on_two_axes((2, 3), plus).trace(new, batch(0, ROWS))


def test_as_many_workers_along_other_axes(tmp_path):
    """Taken as it is, the memories of workers that step alike would not be alike."""
    feedback = jaxcomm.error_feedback(TOP, "slow")
    here, there = on_two_axes((2, 4), feedback), on_two_axes((4, 2), feedback)
    state, data = filled(here), batch(0, ROWS)
    refusal = r"of \(2, 4\) workers, this step has \(4, 2\).*resize_workers\(state, \(4, 2\)\)"
    with pytest.raises(ValueError, match=refusal):
        there.trace(state, data)
    there.trace(jaxcomm.resize_workers(state, (4, 2)), data)
    like = there.abstract_state(tree(), KEY)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, data_state=None)
        with pytest.raises(CheckpointError, match=r"sizes \(2, 4\), .*\(4, 2\): .*resize=True"):
            checkpointer.restore(like)
        found = checkpointer.restore(like, resize=True)[0]
    assert same(host(found), host(jaxcomm.resize_workers(state, (4, 2))))
    with LocalCheckpointer(tmp_path / "local", None) as checkpointer:
        checkpointer.save(1, state, data_state=None)
        checkpointer.wait()
        with pytest.raises(CheckpointError, match="no local checkpoint is whole"):
            checkpointer.restore(like)


def test_eight_simulated_workers_become_four_devices_by_a_checkpoint(tmp_path):
    eight, four = make("two_phase_diloco", 8), make("two_phase_diloco", 4, mesh=mesh(4))
    state = eight.init(tree(jnp.bfloat16), KEY)
    for i in range(4):  # one after a meeting
        state, _ = eight(state, batch(i, ROWS))
    with Checkpointer(tmp_path, workers=8, config={"workers": 8, "seed": 1}) as checkpointer:
        checkpointer.save(4, state, data_state={"next": 5})
    like = four.init(tree(jnp.bfloat16), jax.random.key(9))
    with Checkpointer(tmp_path, workers=4, config={"workers": 4, "seed": 1}) as checkpointer:
        with pytest.raises(CheckpointError, match=r"resize=True.*resize_workers"):
            checkpointer.restore(like)
        found, position, _ = checkpointer.restore(like, resize=True)
        bare = like._replace(layout=None)
        with pytest.raises(CheckpointError, match="does not say what it holds"):
            checkpointer.restore(bare, resize=True)
    assert position == {"next": 5}
    assert same(host(found), host(jaxcomm.resize_workers(state, 4)))
    placed = jax.tree.map(lambda x, y: x.sharding == y.sharding, found, like)
    assert all(jax.tree.leaves(placed))
    data = batch(4, ROWS)
    by_file, metrics = four(found, data)
    in_memory, _ = four(jaxcomm.resize_workers(state, 4), data)
    assert same(host(by_file), host(in_memory))
    assert np.isfinite(metrics["loss"])


def test_the_same_number_is_the_same_state():
    state = filled(make("ef21", 4))
    assert jaxcomm.resize_workers(state, 4) is state


def test_a_state_without_anything_per_worker_needs_no_resizing():
    many, few = (make("average", n, mesh=mesh(n)) for n in (4, 2))
    state, _ = many(many.init(tree(), KEY), batch(0, ROWS))
    resized, _ = few(jaxcomm.resize_workers(state, 2), batch(1, ROWS))
    as_it_is, _ = few(state, batch(1, ROWS))
    assert same(host(resized), host(as_it_is))
    assert as_it_is.layout.workers.count == 2


def test_what_cannot_be_resized_is_refused():
    step = make("ef21", 4)
    state = filled(step)
    for n in (0, -1, 2.0, "2", True, None):
        with pytest.raises(ValueError, match="n must be a whole number of at least 1, got"):
            jaxcomm.resize_workers(state, n)
    unknown = (state._replace(layout=None), {"w": 1}, pickle.loads(pickle.dumps(host(state))))
    for other in unknown:
        with pytest.raises(ValueError, match="does not say what it holds for each worker"):
            jaxcomm.resize_workers(other, 2)
    with pytest.raises(ValueError, match="its tree differs"):
        jaxcomm.resize_workers(state._replace(opt_state=()), 2)
    with pytest.raises(
        ValueError, match=r"of 2 workers, this step has 4.*resize_workers\(state, 4\)"
    ):
        step(jaxcomm.resize_workers(state, 2), batch(0, ROWS))
    assert copy.deepcopy(state).layout is state.layout
    assert Place.REPLICATED in jax.tree.leaves(step.places)


def test_the_position_in_the_data_is_that_of_the_global_batch():
    """One process or two: the next rows of all together are the same."""
    task = make_task(digits_dense.get_config("smoke"))
    alone = task.train_iterator(16, 3)
    for _ in range(3):
        next(alone)
    position, parts = alone.get_state(), []
    for rank in range(2):
        share = task.train_iterator(16, 3, rank, 2)
        share.set_state(position)
        parts.append(next(share))
    together = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    assert same(next(alone), together)


class Rows:
    """`batch(0)`, `batch(1)`, ..."""

    i = -1

    def __next__(self):
        self.i += 1
        return batch(self.i, ROWS)

    def get_state(self):
        return self.i

    def set_state(self, state):
        self.i = state


def test_each_step_counts_the_dense_bytes_of_its_workers(tmp_path):
    """Three steps of 4 workers, then two of 2; a last part that takes no step changes nothing."""
    found = []
    for n, steps in ((4, 3), (2, 5), (2, 5)):
        step = make("average", n)
        with (
            Checkpointer(tmp_path / "checkpoints", workers=n) as checkpointer,
            MetricsLogger(tmp_path, total_steps=steps) as logger,
        ):
            state, options = step.init(tree(), KEY), {"logger": logger, "resize": True}
            run = train_loop(step, state, Rows(), steps=steps, checkpointer=checkpointer, **options)
        found.append(run.dense_bytes)
    assert found == [3 * 1.5 * 96, 3 * 1.5 * 96 + 2 * 96, 3 * 1.5 * 96 + 2 * 96]


@pytest.mark.slow
def test_the_binary_goes_on_with_other_workers_and_the_next_samples(tmp_path, monkeypatch):
    """Dense averaging does not depend on their number: the same batches, and the same losses."""
    seen, call = [], TrainStep.__call__

    def recorded(self, state, data):
        seen.append(np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(data)]).sum())
        return call(self, state, data)

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    config = digits_dense.get_config("smoke")
    config.update({"mode": "simulate", "checkpoint_every": 5, "steps": 10, "log_every": 1})
    whole = train_and_evaluate(config, str(tmp_path / "whole"))
    batches, rows = list(seen), (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    (tmp_path / "whole/summary.json").unlink()
    (tmp_path / "whole/checkpoints/10/jaxcomm.json").unlink()  # as if killed after step 5
    config.workers, seen[:] = 2, []
    with pytest.raises(CheckpointError, match=r"config\.resize"):
        train_and_evaluate(config, str(tmp_path / "whole"))
    config.resize = True
    parts = train_and_evaluate(config, str(tmp_path / "whole"))
    assert seen == batches[5:]
    assert len((tmp_path / "whole/metrics.jsonl").read_text().splitlines()) == len(rows) == 10
    assert parts["workers"] == 2
    assert parts["dense_bytes"] == whole["dense_bytes"] * 5 / 6  # 1.5 and 1 times the parameters
    np.testing.assert_allclose(parts["validation_loss"], whole["validation_loss"], rtol=1e-4)
