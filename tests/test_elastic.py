"""What the survivors of a job take along: state, rows and means."""

import concurrent.futures
import contextlib
import socket
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm.training import _storage, elastic
from jaxcomm.training._sockets import Connections
from jaxcomm.training.elastic import ElasticStep, put_back, take
from jaxcomm.training.workers import Place

AXIS, RATE, SIZE = "workers", 0.1, 5
ALIVE = [0, 1, 3]  # of four
PARAMS = {"w": jnp.arange(SIZE, dtype=jnp.float32)}


def make(tx, devices, sync=None):
    mesh = jax.sharding.Mesh(devices, (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    loss_fn = lambda params, batch, key: 0.5 * jnp.mean((batch - params["w"]) ** 2)
    return jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, mesh=mesh, sync=sync)


def rows(number, workers):
    """A row a worker, so that row i is what worker i trains on."""
    x = np.random.default_rng(number).normal(size=(4, SIZE)).astype(np.float32)
    return x[workers]


def survivors(tx, sync=None, steps=3):
    """Four workers train, the third is lost: (state before, step and state after, fresh leaves)."""
    devices = jax.devices()
    before = make(tx, devices[:4], sync)
    state = before.init(PARAMS, jax.random.key(0))
    for number in range(steps):
        state, _ = before(state, rows(number, slice(None)))
    snapshot = take(state, before.places)
    left = {
        path: x[ALIVE] if snapshot.kinds[path] is Place.PER_WORKER else x
        for path, x in snapshot.leaves.items()
    }
    after = make(tx, [devices[i] for i in ALIVE], sync)
    new, fresh = put_back(snapshot._replace(leaves=left), after)
    return state, after, new, fresh


def test_synchronous_training_goes_on_with_the_mean_over_the_living():
    tx = optax.chain(jaxcomm.average(AXIS), optax.sgd(RATE, momentum=0.9))
    old, step, state, fresh = survivors(tx)
    assert fresh == []
    assert (int(state.step), int(state.skipped)) == (3, 0)
    np.testing.assert_array_equal(state.params["w"], old.params["w"])
    w, trace = np.asarray(state.params["w"]), np.asarray(optax.tree.get(state, "trace")["w"])
    batch = rows(7, ALIVE)
    new, metrics = step(state, batch)
    trace = 0.9 * trace + (w - batch).mean(0) / SIZE
    np.testing.assert_allclose(new.params["w"], w - RATE * trace, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 0.5 * ((batch - w) ** 2).mean(), rtol=1e-6)


def test_error_memories_of_the_living_stay_and_those_cut_by_position_start_again():
    tx = jaxcomm.one_bit_adam(RATE, AXIS, freeze_step=1)
    old, step, state, fresh = survivors(tx)
    assert len(fresh) == 1
    assert fresh[0].endswith(".server_error")
    flat, new = _storage.flatten(old), _storage.flatten(state)
    (error,) = (path for path in flat if ".error" in path)
    assert np.abs(flat[error]).max() > 0
    np.testing.assert_array_equal(new[error], np.asarray(flat[error])[ALIVE])
    assert new[fresh[0]].shape == (3, 2)
    assert not np.asarray(new[fresh[0]]).any()
    state, _ = step(state, rows(7, ALIVE))
    assert int(state.step) == 4


def test_ef21_estimates_are_again_what_their_mean_is():
    tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=1), AXIS), optax.sgd(RATE))
    _, step, state, fresh = survivors(tx)
    assert fresh == []
    local, mean = np.asarray(state.opt_state[0].local["w"]), state.opt_state[0].mean["w"]
    np.testing.assert_array_equal(local, np.broadcast_to(mean, (3, SIZE)))
    for number in range(3):  # and stays so: g = (1/n) sum_i g_i over the living
        state, _ = step(state, rows(7 + number, ALIVE))
    ef21 = state.opt_state[0]
    np.testing.assert_allclose(np.asarray(ef21.local["w"]).mean(0), ef21.mean["w"], rtol=1e-5)


def test_local_replicas_of_the_living_meet_without_the_dead():
    old, step, state, _ = survivors(optax.sgd(RATE), jaxcomm.local_sgd(AXIS, every=5))
    np.testing.assert_array_equal(state.params["w"], np.asarray(old.params["w"])[ALIVE])
    w = np.asarray(state.params["w"])
    for number in (3, 4):  # the fifth step is a meeting
        batch = rows(number, ALIVE)
        w = w - RATE * (w - batch) / SIZE
        state, _ = step(state, batch)
    expected = np.broadcast_to(w.mean(0), (3, SIZE))
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)


def test_copies_are_taken_at_least_every_step():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ElasticStep(lambda devices: pytest.fail(str(devices)), jax.devices(), every=0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="connections are seen on Linux only")
def test_what_was_opened_while_watching_is_hung_up_and_nothing_else():
    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(2)]
        connections = Connections()
        with connections.watching():
            pairs.append([stack.enter_context(end) for end in socket.socketpair()])
        pairs.append([stack.enter_context(end) for end in socket.socketpair()])
        with connections.watching():
            pass
        assert connections.hang_up() == 2  # both ends are this process's
        assert connections.hang_up() == 0
        for i, (here, there) in enumerate(pairs):
            there.settimeout(5)
            if i == 2:
                assert there.recv(1) == b""
            else:
                here.sendall(b"x")
                assert there.recv(1) == b"x"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="connections are seen on Linux only")
def test_another_thread_hangs_up_what_was_opened_just_now():
    connections = Connections()
    for _ in range(2):
        with connections.watching():
            here, there = socket.socketpair()
            with here, there, concurrent.futures.ThreadPoolExecutor(1) as pool:
                assert pool.submit(connections.hang_up).result() == 2
                assert there.recv(1) == b""


def test_all_stop_at_the_same_call(monkeypatch):
    """Who reads early sees a request of the call to come, and must not stop sooner."""
    keys = {}
    service = types.SimpleNamespace(
        key_value_set=keys.__setitem__, key_value_dir_get=lambda _: list(keys.items())
    )
    monkeypatch.setattr(elastic, "client", lambda: service)
    monkeypatch.setattr(ElasticStep, "_survive", lambda self, run, state: (None, run(state)))
    ways = optax.chain(jaxcomm.average(AXIS), optax.sgd(RATE))
    steps = [ElasticStep(lambda devices: make(ways, devices), jax.devices()[:2]) for _ in range(2)]
    states = [step.init(PARAMS, jax.random.key(0)) for step in steps]
    call = lambda i: steps[i](states[i], rows(0, slice(2)))[0]
    states = [call(0), call(1)]
    steps[0].ask_to_stop()
    assert not steps[0].stopping()
    states[0] = call(0)
    assert [step.stopping() for step in steps] == [True, False]
    states[1] = call(1)
    assert steps[1].stopping()


def test_survivors_are_connected_before_they_build_the_step(monkeypatch):
    """One of them may compile for longer than gloo waits at the first collective."""
    events, devices = [], jax.devices()
    real = elastic.connect
    monkeypatch.setattr(elastic, "connect", lambda ds: (events.append(("connect", ds)), real(ds)))

    def build(ds):
        events.append(("make", list(ds)))
        return make(optax.chain(jaxcomm.average(AXIS), optax.sgd(RATE)), ds)

    step = ElasticStep(build, devices[:2])
    step._snapshot = take(step.init(PARAMS, jax.random.key(0)), step.places)
    events.clear()
    step._rebuild(devices[:1])
    assert events == [("connect", devices[:1]), ("make", devices[:1])]


def test_what_all_do_together_is_given_the_state():
    step = make(optax.chain(jaxcomm.average(AXIS), optax.sgd(RATE)), jax.devices()[:2])
    state = step.init(PARAMS, jax.random.key(0))
    same, number = step.together(lambda state: int(state.step), state)
    assert same is state
    assert number == 0
