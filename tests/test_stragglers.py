"""Slow and hung processes, and slow hosts in a matrix of delays: planted, and none."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm.training import StragglerMonitor, find_hung, find_slow, localise, robust_scores
from jaxcomm.training.straggler_monitor import step_alone
from jaxcomm.training.stragglers import (
    EVERYBODY,
    HUNG_COMMUNICATION,
    HUNG_COMPUTATION,
    SLOW_COMMUNICATION,
    SLOW_COMPUTATION,
)
from tests import common

SIZES = [2, 3, 4, 8, 64]
SIGMA = 1e-4  # noise of a delay of 1 ms


def _delays(n, seed, repeats=9):
    return 1e-3 + SIGMA * np.random.default_rng(seed).standard_normal((repeats, n, n))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["sender", "receiver", "link", "nothing"])
def test_planted_faults_are_found_exactly(n, kind):
    for seed in range(20):
        delays = _delays(n, seed)
        s, r = np.random.default_rng(seed).permutation(n)[:2]
        rise = (10 if n == 2 else 5) * SIGMA  # of one ping; their median has less noise
        where = {"sender": (s,), "receiver": (slice(None), r), "link": (s, r)}
        if kind != "nothing":
            delays[(slice(None), *where[kind])] += rise
        found = [fault[:3] for fault in localise(delays)]
        named = "link" if n == 2 and kind != "nothing" else kind  # there the three are one
        if n == 2 and kind == "receiver":
            s = 1 - r
        if n == 2 and kind == "sender":
            r = 1 - s
        expected = {
            "sender": [("sender", s, None)],
            "receiver": [("receiver", None, r)],
            "link": [("link", s, r)],
            "nothing": [],
        }
        assert found == expected[named], (n, seed)


def test_two_faults_at_once():
    delays = _delays(8, 0)
    delays[:, 2, :] += 2e-3
    delays[:, 5, 1] += 5e-3
    delays[:, :, 6] += 1e-3
    found = {fault[:3] for fault in localise(delays)}
    assert found == {("sender", 2, None), ("link", 5, 1), ("receiver", None, 6)}


@pytest.mark.parametrize("n", [4, 5, 8])
@pytest.mark.parametrize("rises", [(2e-3, 10e-3), (5e-3, 2e-3), (1e-3, 1e-3), (20e-3, 20e-3)])
def test_faults_that_share_entries_bring_no_others(n, rises):
    delays = np.full((n, n), 1e-3)
    delays[1] += rises[0]
    row, crossing = delays.copy(), delays.copy()
    row[1, 0] += rises[1]
    crossing[:, 2] += rises[1]
    for matrix, other in ((row, ("link", 1, 0)), (crossing, ("receiver", None, 2))):
        found = {fault[:3]: fault.seconds for fault in localise(matrix)}
        expected = {("sender", 1, None): 1e-3 + rises[0], other: 1e-3 + rises[1]}
        assert found == {place: pytest.approx(seconds) for place, seconds in expected.items()}


def test_two_links_of_one_sender_are_no_slow_sender():
    delays = np.full((4, 4), 1e-3)
    delays[0, 1] = delays[0, 2] = 3e-3
    assert {fault[:3] for fault in localise(delays)} == {("link", 0, 1), ("link", 0, 2)}


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("unknown", [math.nan, math.inf])
@pytest.mark.filterwarnings("error")
def test_unknown_delays_take_no_part(n, unknown):
    delays = np.full((n, n), 1e-3)
    np.fill_diagonal(delays, math.nan)
    delays[0, 1] = unknown
    assert localise(delays) == []
    assert localise(np.full((n, n), unknown)) == []
    if n > 2:
        delays[1] = 4e-3
        assert [fault[:3] for fault in localise(delays)] == [("sender", 1, None)]
    pings = np.full((5, n, n), 1e-3)
    pings[2, 1, 0] = unknown
    pings[:, 0, 1] = 5e-3
    assert [fault[:3] for fault in localise(pings)] == [("link", 0, 1)]


def test_lost_pings_bring_no_faults():
    """Of a link with one ping left, the noise of one; nor is the noise taken from such links."""
    for seed in range(20):
        delays = _delays(8, seed)
        delays[1:, 1, 0] = math.nan
        assert localise(delays) == []
        delays[:, 3] += 10 * SIGMA
        assert [fault[:3] for fault in localise(delays)] == [("sender", 3, None)]
        delays = _delays(8, seed)
        delays[1:][:, np.random.default_rng(seed).random((8, 8)) < 0.7] = math.nan
        assert localise(delays) == []


def test_a_probe_does_not_take_a_link_it_has_not_measured_for_a_fast_one():
    from experiments.probe import Probe

    latency = [[None if i == j else 1e-4 for j in range(3)] for i in range(3)]
    bandwidth = [[None if i == j else 1e8 for j in range(3)] for i in range(3)]
    for i, j in ((0, 1), (1, 0), (1, 2)):
        latency[i][j] = bandwidth[i][j] = None
    assert Probe(3, None, latency, bandwidth).faults == []
    latency[1][2], bandwidth[1][2] = 1e-4, 1e8
    bandwidth[2] = [1e7, 1e7, None]
    (fault,) = Probe(3, None, latency, bandwidth).faults
    assert fault[:3] == ("sender", 2, None)


def test_a_fault_says_what_it_is():
    delays = np.full((3, 3), 1e-3)
    delays[1] = 4e-3
    (fault,) = localise(delays)
    assert str(fault) == "host 1 sends slowly: 0.004 s where 0.001 s is usual"
    with pytest.raises(ValueError, match=r"\(n, n\), n at least 2, got \(2, 3\)"):
        localise(np.ones((2, 3)))


def _wait(compute):
    """For the last one to come, in the collective."""
    return compute.max(1, keepdims=True) - compute


@pytest.mark.parametrize("n", SIZES)
def test_slow_computation(n):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        compute = 0.1 * (1 + 0.02 * rng.standard_normal((5, n)))
        slow = int(rng.integers(n))
        transfer = 0.02
        assert find_slow(compute, transfer + _wait(compute)) == []
        compute[:, slow] *= 2
        (found,) = find_slow(compute, transfer + _wait(compute), usual_collective=transfer)
        assert (found.process, found.kind) == (slow, SLOW_COMPUTATION)


@pytest.mark.parametrize("n", SIZES)
def test_slow_communication(n):
    rng = np.random.default_rng(n)
    compute = 0.1 * (1 + 0.005 * rng.standard_normal(n))
    collective = 0.02 * (1 + 0.02 * rng.standard_normal(n))
    collective[n - 1] *= 2
    (found,) = find_slow(compute, collective)
    assert (found.process, found.kind) == (n - 1, SLOW_COMMUNICATION)
    everybody = find_slow(compute, np.full(n, 0.06), usual_collective=0.02)
    assert [(f.process, f.kind) for f in everybody] == [(EVERYBODY, SLOW_COMMUNICATION)]
    assert str(everybody[0]).startswith("everybody is slow in communication: 0.05")


def test_hung():
    kinds = lambda *tables: [(f.process, f.kind) for f in find_hung(*tables)]
    assert kinds([1, 1, 0], [0, 0, 0]) == [(2, HUNG_COMPUTATION)]
    assert kinds([1, 1, 1], [0, 1, 0]) == [(0, HUNG_COMMUNICATION), (2, HUNG_COMMUNICATION)]
    assert kinds([1, 1, 1], [1, 1, 1]) == kinds([0, 0, 0], [0, 0, 0]) == []
    with pytest.raises(ValueError, match="must have started"):
        find_hung([0, 1], [1, 1])


def test_scores_do_not_see_what_is_unknown():
    scores = robust_scores([1.0, 1.0, math.nan, 3.0])
    assert np.isnan(scores[2])
    assert scores[3] == pytest.approx(40)
    assert np.isnan(robust_scores([math.nan] * 2)).all()
    with pytest.raises(ValueError, match=r"same shape, got \(1, 2\) and \(1, 3\)"):
        find_slow([1.0, 2.0], [1.0, 2.0, 3.0])


def test_of_two_known_times_the_longer_is_slow():
    unknown = math.nan
    (found,) = find_slow([1.0, unknown, 3.0], [2.1, unknown, 0.1])
    assert (found.process, found.kind, found.usual) == (2, SLOW_COMPUTATION, 1.0)
    (found,) = find_slow([1.0, unknown, 1.0], [0.1, unknown, 0.3])
    assert (found.process, found.kind) == (2, SLOW_COMMUNICATION)


def test_a_wait_for_nobody_knows_whom_is_no_slow_communication():
    """In two of three steps somebody's computation is unknown, once the slow one's."""
    unknown = math.nan
    compute = [[1, 1, 3], [unknown, 1, 3], [1, 1, unknown]]
    (found,) = find_slow(compute, [[2.1, 2.1, 0.1]] * 3)
    assert (found.process, found.kind) == (2, SLOW_COMPUTATION)
    for steps in (1, 2):  # everybody may have waited for the last process
        found = find_slow([[1, 1, 1, unknown]] * steps, [[2.1] * 4] * steps, usual_collective=0.1)
        assert found == []


class Store(dict):
    """What the coordination service does."""

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]


def test_the_monitor_names_the_slow_process(caplog):
    store, computes = Store(), [0.1, 0.1, 0.3, 0.1]
    monitors = [
        StragglerMonitor(lambda i=i: computes[i], process=i, processes=4, store=store)
        for i in range(4)
    ]
    every = lambda step, seconds: [monitor(step, seconds) for monitor in monitors[::-1]][-1]
    assert every(10, 1.0) == []  # no step has been timed yet
    with caplog.at_level("WARNING", logger="absl"):
        (found,) = every(20, 1.0 + 10 * 0.32)
    assert (found.process, found.kind) == (2, SLOW_COMPUTATION)
    line = "step 20: process 2 is slow in computation: 0.3 s a step where 0.1 s is usual"
    assert line in caplog.text
    computes[2] = 0.1
    assert every(30, 4.2 + 10 * 0.12) == []
    assert every(40, 5.4 + 10 * 0.2) == []  # once may have been an evaluation
    (found,) = every(50, 7.4 + 10 * 0.2)  # all computed as before: it is the links
    assert (found.process, found.kind) == (EVERYBODY, SLOW_COMMUNICATION)


def test_nobody_is_compared_with_a_process_that_is_gone(caplog):
    """Of three, the last is gone, with the numbers it had; of the other two one is slow."""
    store, computes = Store(), [0.1, 0.3, 0.1]
    monitors = [
        StragglerMonitor(lambda i=i: computes[i], process=i, processes=3, store=store)
        for i in range(3)
    ]
    for step in (1, 2):
        for monitor in monitors[::-1]:
            monitor(step, 0.32 * step)
    computes[1] = 0.1
    with caplog.at_level("WARNING", logger="absl"):
        for step, slow in ((3, 0.1), (4, 0.3)):
            computes[0] = slow
            monitors[1](step, 0.32 * step, lost=(2,))
            found = monitors[0](step, 0.32 * step, lost=(2,))
            assert [(f.process, f.kind) for f in found] == [(0, SLOW_COMPUTATION)] * (step == 4)
            assert all(f.usual == 0.1 for f in found)
    assert "process 2" not in caplog.text


def test_a_service_that_does_not_answer_is_no_reason_to_end(caplog):
    class Gone(Store):
        def key_value_set(self, key, value, allow_overwrite=False):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection refused\nand more")

    monitor = StragglerMonitor(lambda: 0.1, process=1, processes=2, store=Gone())
    assert monitor(1, 0.2) == []
    with caplog.at_level("WARNING", logger="absl"):
        assert monitor(2, 0.4) == []
    assert "step 2: no times: UNAVAILABLE: connection refused" in caplog.text


def test_a_step_alone_takes_what_it_computes():
    tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=2), "workers"), optax.sgd(0.1))
    loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers")
    state, batch = step.init(jnp.zeros(64), jax.random.key(0)), jnp.ones((8, 64))
    seconds = step_alone(step, state, batch)
    assert 0 < seconds() < 1
    step(state, batch)  # still to be used


def test_a_step_alone_with_an_empty_leaf_and_transfers_in_the_background():
    rule = jaxcomm.streaming(jaxcomm.average(common.AXIS), 4, 1, delay=2)
    step = jaxcomm.make_train_step(
        common.loss_fn,
        optax.adam(0.02),
        axis_name=common.AXIS,
        sync=rule,
        background=True,
        mesh=common.mesh(4),
    )
    state = step.init(common.tree(), jax.random.key(0))
    assert 0 < step_alone(step, state, common.batch(0))() < 1


@pytest.mark.slow
def test_a_slow_process_of_a_real_job(tmp_path, monkeypatch):
    from experiments import cluster

    monkeypatch.chdir(Path(__file__).parent.parent)
    path = tmp_path / "found.json"
    code = f"""
import json, time, jax
from jaxcomm.training import StragglerMonitor, distributed
from jax.experimental.multihost_utils import sync_global_devices
distributed.initialize()
me = jax.process_index()
monitor = StragglerMonitor(lambda: 0.1 + 0.3 * (me == 1))
sync_global_devices("start")
found = monitor(0, 0.0)
for step in (1, 2):
    if me == 0:
        sync_global_devices("written")
    found = monitor(step, 0.5 * step)
    if me:
        sync_global_devices("written")
if me == 0:
    json.dump([list(f) for f in found], open({str(path)!r}, "w"))
sync_global_devices("end")
"""
    report = cluster.launch(cluster.Job(("-c", code), hosts=3, timeout=120))
    assert report.outcome.exit_code == 0, sys.stderr
    ((process, kind, *_),) = json.loads(path.read_text())
    assert (process, kind) == (1, SLOW_COMPUTATION)
