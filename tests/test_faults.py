"""Processes that die, get stuck or lose their disk: who is named, what is started again."""

import os
import re
import signal
import sys
import time
import types

import jax
import pytest
from jax.experimental import multihost_utils

from experiments import bench_faults, cluster, processes
from experiments.bench_faults_cases import KINDS, METHODS, Case, draw, possible
from experiments.bench_faults_job import STEPS, Run
from experiments.bench_faults_run import measure
from jaxcomm.training import distributed, loop
from jaxcomm.training.watchdog import FINISHED, TRY_AGAIN, Beat, Watch, Watchdog

NOBODY = (-1, "nobody was accused")


def watched(silence=10.0, standstill=0.0):
    """Rank 1 of three, all alive at time 0 and judged once a second."""
    return Watch(1, {0, 2}, silence, standstill, 0.0)


def live(watch, start, end, beats):
    """Judges every second; `beats(t)` is what the service answers, None if it does not."""
    for t in range(start, end):
        answer = beats(t)
        if answer is not None:
            watch.hear(answer, float(t))
        if sentence := watch.verdict(float(t)):
            return t, sentence
    return NOBODY


def test_nobody_is_accused_while_all_beat():
    beats = lambda t: {0: Beat(t, 1), 2: Beat(t, 1)}
    assert live(watched(), 1, 100, beats) == NOBODY


def test_a_silent_process_is_named_with_its_last_step():
    beats = lambda t: {0: Beat(t, t), 2: Beat(min(t, 5), min(t, 5))}
    when, sentence = live(watched(), 1, 100, beats)
    assert when == 16  # the last beat at 5, and more than ten seconds
    assert sentence == "rank 2 (last at step 5) is stuck or gone: no sign of life for 11.0 s"


def test_a_process_that_never_beat_has_time_to_start():
    when, sentence = live(watched(), 1, 1000, lambda t: {0: Beat(t, t)})
    assert when == 301
    assert sentence.startswith("rank 2 (last at step 0) is stuck or gone")


def test_a_silent_service_is_rank_0():
    beats = lambda t: {0: Beat(t, 7), 2: Beat(t, 7)} if t < 20 else None
    when, sentence = live(watched(), 1, 100, beats)
    assert when == 30
    assert sentence.startswith("rank 0 is stuck or unreachable")
    assert sentence.endswith("last seen at step 7")


def test_a_silent_service_hides_who_beat_a_little_earlier():
    beats = lambda t: {0: Beat(t, 7), 2: Beat(min(t, 17), 7)} if t < 20 else None
    assert live(watched(), 1, 100, beats)[1].startswith("rank 0 is stuck or unreachable")


def test_the_silent_are_left_before_the_end():
    left = []
    watchdog = Watchdog(10.0)
    watchdog.leave_silent(lambda: left.append("them"), 20.0)
    seen = ((0, []), (11, [1]), (30, [1]), (32, [1]), (33, []), (50, [2]), (51, [0, 2]))
    assert [watchdog._waits(t, ranks) for t, ranks in seen] == [
        *(False, True, True, False),
        *(False, True, False),
    ]
    assert left == ["them"] * 2


def test_a_process_that_was_suspended_does_not_accuse_the_others():
    watch = watched()
    assert live(watch, 1, 5, lambda t: {0: Beat(t, 1), 2: Beat(t, 1)}) == NOBODY
    assert watch.verdict(500.0) is None
    assert live(watch, 501, 520, lambda t: {0: Beat(t, 1), 2: Beat(t, 1)}) == NOBODY
    _, sentence = live(watch, 520, 600, lambda t: {0: Beat(t, 1)})
    assert sentence.startswith("rank 2 (last at step 1) is stuck")


def test_steps_that_stand_still_name_who_is_furthest_behind():
    watch = watched(standstill=30.0)

    def beats(t):
        if t < 8:
            watch.step(t, float(t))
        return {0: Beat(t, min(t, 7)), 2: Beat(t, min(t, 6))}

    when, sentence = live(watch, 1, 100, beats)
    assert when == 38
    assert sentence == "no step for 31.0 s; furthest behind: rank 2 (last at step 6)"


def test_no_step_is_due_before_the_first_begins():
    beats = lambda t: {0: Beat(t, 0), 2: Beat(t, 0)}
    watch = watched(standstill=30.0)
    assert live(watch, 1, 100, beats) == NOBODY
    watch.step(0, 99.0)
    assert live(watch, 100, 200, beats)[0] == 130


def test_it_beats_at_once_and_needs_no_device(monkeypatch):
    keys = {}
    service = types.SimpleNamespace(
        key_value_set=lambda key, value, **_: keys.__setitem__(key, value),
        key_value_dir_get=lambda _: list(keys.items()),
    )
    monkeypatch.setattr(distributed, "client", lambda: service)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(jax, "process_count", pytest.fail)
    with Watchdog(silence=60.0, end=pytest.fail) as watchdog:
        assert keys == {"jaxcomm/beats/0": "1 0"}
        watchdog.step(3)
    assert keys == {"jaxcomm/beats/0": f"{FINISHED} 3"}


def test_the_calls_of_a_resumed_run_are_counted_from_one(monkeypatch):
    """JAX stops at the call after the last one of anybody before the signal, which may be none."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    signal_ = loop._StopSignal(None)
    assert [signal_.requested() for _ in range(3)] == [None] * 3
    assert asked == [1, 2, 3]


def test_who_has_finished_or_is_forgotten_may_be_silent():
    watch = watched()
    watch.forget(0)
    assert live(watch, 1, 100, lambda _: {2: Beat(FINISHED, 9)}) == NOBODY


def test_a_process_on_its_own_is_not_watched():
    with Watchdog(silence=0.1, end=pytest.fail) as watchdog:
        watchdog.step(1)
        assert watchdog.blame() is None


@pytest.mark.parametrize("name", ["silence", "standstill"])
def test_negative_times_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1 s"):
        Watchdog(**{name: -1.0})


# ---------------------------------------------------------------- the supervisor


def ended(*codes, stopped=(), code=1, final=False):
    """A job whose ranks ended one second after the other; `stopped` by the launcher."""
    ranks = tuple(processes.Ended(i, c, float(i), i in stopped) for i, c in enumerate(codes))
    return processes.Outcome(code, "why" if code else None, ranks, final)


@pytest.mark.parametrize(
    ("outcome", "left", "again"),
    [
        (ended(0, 0, code=0), 3, False),
        (ended(-15, -9, stopped={0}, code=137), 3, True),  # rank 1 was killed
        (ended(75, -9, stopped={1}, code=75), 1, True),  # rank 1 was stuck, says rank 0
        (ended(143, 143, code=143), 1, True),  # preempted
        (ended(-9, -9, stopped={0}, code=137), 0, False),  # no restarts left
        (ended(2, -15, stopped={1}, code=2), 3, False),  # the user's mistake
        (ended(-9, 0, 2, code=2), 3, False),  # also after a loss that was allowed
        (ended(0, -9, code=0), 3, False),  # the others went on to the end
        (ended(0, -15, stopped={1}, code=0), 3, False),  # lost at the end
        (ended(0, -15, -15, stopped={1, 2}), 3, True),  # more than may be lost
        (ended(-15, -15, stopped={0, 1}, code=143, final=True), 3, False),  # a signal, a time-out
    ],
)
def test_what_is_started_again(outcome, left, again):
    assert cluster.starts_again(outcome, left) is again


@pytest.mark.parametrize(
    ("least", "failed", "hosts"),
    [
        (None, [1, 1, 1, 1], 3),
        (1, [], 3),
        (1, [1], 3),
        (1, [1, 2], 3),
        (1, [1, 1], 2),
        (1, [1, 1, 1], 2),  # with the other hosts that is a new beginning
        (1, [1, 1, 1, 1], 1),
        (2, [1, 1, 1, 1], 2),
    ],
)
def test_a_rank_that_fails_twice_in_a_row_is_a_host_that_is_gone(least, failed, hosts):
    job = cluster.Job(("-c", "1"), 3, restarts=9, fewer_hosts=least)
    outcomes = [ended(*(0 if rank != f else -9 for rank in range(3))) for f in failed]
    assert cluster.hosts_left(job, outcomes) == hosts


CHILD = (
    "import os, sys, time;"
    "a, r = (int(os.environ['JAXCOMM_' + n]) for n in ('ATTEMPT', 'PROCESS_ID'));"
)


def supervised(code, **options):
    return cluster.launch(cluster.Job(("-c", CHILD + code), 2, **options))


def test_a_job_is_started_again_until_it_ends_well(capsys):
    code = "print('port', os.environ['JAXCOMM_COORDINATOR']);"
    code += "sys.exit(0) if a == 2 else sys.exit(9) if r == 1 else time.sleep(60)"
    report = supervised(code, restarts=5)
    assert report.outcome.exit_code == 0
    assert [outcome.exit_code for outcome in report.failures] == [9, 9]
    out, err = capsys.readouterr()
    assert "cluster: rank 1 exited with code 9; ended rank 0; attempt 2 of 6" in err
    assert len(set(re.findall(r"port (\S+)", out))) == 3
    assert report.as_dict()["failures"] == ["rank 1 exited with code 9; ended rank 0"] * 2


def test_a_host_that_is_gone_is_left_out():
    report = supervised("sys.exit(r)", restarts=5, fewer_hosts=1)
    assert report.outcome.exit_code == 0
    assert (len(report.failures), len(report.outcome.ranks)) == (2, 1)


def test_restarts_come_to_an_end_and_the_time_out_holds_for_all_attempts():
    assert supervised("sys.exit(5)", restarts=2).outcome.exit_code == 5
    begin = time.monotonic()
    report = supervised("time.sleep(.4); sys.exit(5)", restarts=1000, timeout=1.5)
    assert report.outcome.exit_code == 124
    assert report.failures
    report = supervised("r and sys.exit(5); time.sleep(60)", restarts=9, losses=1, timeout=1.0)
    assert report.outcome.exit_code == 124
    assert report.failures == ()
    assert time.monotonic() - begin < 10


# ---------------------------------------------------------------- the fault script


def test_draws_follow_from_the_seed_and_take_turns():
    cases = [draw(0, i, KINDS) for i in range(60)]
    assert cases == [draw(0, i, KINDS) for i in range(60)]
    assert cases != [draw(1, i, KINDS) for i in range(60)]
    assert {case.method for case in cases} == set(METHODS)
    for case in cases:
        assert 0 <= case.rank < case.processes
        assert 0 < case.step < STEPS
        if case.kind == "continue":  # process 0 hosts the coordination service
            assert case.rank > 0
            assert case.processes == 3
    assert [case.kind for case in cases[:6]] == list(KINDS)


def test_the_table_has_a_line_a_kind():
    row = {"kind": "kill", "failure": None, "noticed_seconds": 1.0, "lost_steps": 3}
    rows = [{**row, "recovery_seconds": 10.0}, {**row, "recovery_seconds": 30.0, "lost_steps": 9}]
    rows.append({"kind": "full", "failure": "it hung"})
    *_, kill, full = bench_faults.table(rows).splitlines()
    assert kill == "| kill | 2 | 0 | 1.0, 1.0 | 20.0, 30.0 | 6, 9 |"
    assert full == "| full | 1 | 1 |  |  |  |"


def test_unknown_faults_are_refused():
    with pytest.raises(ValueError, match=r"kinds must be of kill, .* got flood"):
        possible(["kill", "flood"])


def test_lines_are_read_as_they_come_and_no_fault_hits_a_stranger(tmp_path):
    run = Run([sys.executable, "-c", "print('step 1/2')"], tmp_path / "log", tmp_path)
    _, _, match = run.wait_for(r"step (\d)/", time.monotonic() + 20)
    assert match[1] == "1"
    with pytest.raises(TimeoutError, match="no line with 'never'"):
        run.wait_for("never", time.monotonic() + 20)
    with pytest.raises(ProcessLookupError, match="no process of rank 1"):
        run.pid(1)
    run.end()
    assert (tmp_path / "log").read_text() == "step 1/2\n"


FAULTS = ("kill", "stop", "full", "continue")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=FAULTS)
def test_a_fault_in_mid_run(number, tmp_path_factory):
    kind = FAULTS[number]
    if kind not in possible([kind]):
        pytest.skip(f"this machine does not allow {kind}")
    workdir = tmp_path_factory.getbasetemp() / "faults"  # they share the run without a fault
    case = Case(number, kind, "ef21", 2, 1, 35, 0.02)
    row = measure(case, workdir, timeout=240.0, stuck=8.0)
    assert row["failure"] is None, row
    assert row["lost_steps"] <= STEPS
    assert row["attempts"] == (1 if kind == "continue" else 2) or kind == "full"


SLOW_SAVES = """
import os, runpy, time
from jaxcomm.training import checkpoint
write = checkpoint.write_marker
def slow(*args):
    time.sleep(8)
    write(*args)
    print("written", flush=True)
checkpoint.write_marker = slow
"""
SLOW_ENDS = """
import os, runpy, time
from jaxcomm.training.metrics import MetricsLogger
summary = MetricsLogger.summary
def slow(self, values):
    summary(self, values)
    time.sleep(3 * int(os.environ["JAXCOMM_PROCESS_ID"]))
MetricsLogger.summary = slow
"""

# longer than gloo waits for those who come to a new group
SLOW_SURVIVOR = """
import os, runpy, time
from jaxcomm.training import elastic
put_back = elastic.put_back
def slow(*args):
    time.sleep(33 * (os.environ["JAXCOMM_PROCESS_ID"] == "2"))
    return put_back(*args)
elastic.put_back = slow
"""
SLOW_DATA = """
import os, runpy, time
from experiments import tasks
make_task = tasks.make_task
def slow(config):
    print("reads", flush=True)
    time.sleep(33 * (os.environ["JAXCOMM_PROCESS_ID"] == "1"))
    return make_task(config)
tasks.make_task = slow
"""


def elastic(patch, hosts, tmp_path, *fields):
    """A job that goes on after a loss; each process runs the patch first."""
    code = f"{patch}\nrunpy.run_module('experiments.train', run_name='__main__')"
    words = [sys.executable, "-m", "experiments.cluster", f"--hosts={hosts}", "--losses=1"]
    words += ["--timeout=350", "--", "-c", code, "--config=configs/digits_ef21.py:smoke"]
    fields = (f"workers={hosts}", "batch_size=60", "log_every=1", *fields)
    fields = ("on_failure=continue", "stuck_seconds=8", "checkpoint_every=10000", *fields)
    words += [f"--workdir={tmp_path}", *(f"--config.{field}" for field in fields)]
    return Run(words, tmp_path / "log", tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stuck_process_is_left_and_after_that_sigterm_saves(tmp_path):
    """The file system is slower than the launcher is patient."""
    run = elastic(SLOW_SAVES, 3, tmp_path, "steps=9000")
    try:
        wait = lambda pattern, start=0: run.wait_for(pattern, time.monotonic() + 120, start)[0]
        wait(r"\[0\] step 5/")
        os.kill(run.pid(1), signal.SIGSTOP)
        wait(r"\[0\] step ", wait(r"\[0\] .* going on after"))
        os.kill(run.pid(2), signal.SIGTERM)
        assert run.process.wait(60) == 128 + signal.SIGTERM
    finally:
        run.end()
    lines = [line for _, line in run.lines]
    stopped = [i for i, line in enumerate(lines) if "by SIGTERM; the state is saved" in line]
    assert len(stopped) == 2
    assert lines.index("[0] written") < stopped[0]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {int(saved.name)} " in lines[stopped[0]]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("patch", "on_failure"), [(SLOW_ENDS, "continue"), (SLOW_DATA, "stop")], ids=["ends", "data"]
)
def test_a_process_may_read_its_data_or_end_later_than_the_others(patch, on_failure, tmp_path):
    run = elastic(patch, 2, tmp_path, "steps=3", f"on_failure={on_failure}")
    try:
        assert run.process.wait(300) == 0
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_survivor_may_compile_for_longer_than_the_others(tmp_path):
    run = elastic(SLOW_SURVIVOR, 3, tmp_path, "steps=9000", "stuck_seconds=60")
    try:
        wait = lambda pattern, start=0: run.wait_for(pattern, time.monotonic() + 120, start)[0]
        wait(r"\[0\] step 5/")
        os.kill(run.pid(1), signal.SIGKILL)
        wait(r"\[0\] step ", wait(r"\[0\] .* going on after"))
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_process_that_is_stopped_while_it_reads_its_data_is_named(on_failure, tmp_path):
    run = elastic(SLOW_DATA, 2, tmp_path, "steps=3", f"on_failure={on_failure}")
    try:
        run.wait_for(r"\[1\] reads", time.monotonic() + 120)
        os.kill(run.pid(1), signal.SIGSTOP)
        run.wait_for(r"\[0\] error: rank 1 .* is stuck or gone", time.monotonic() + 60)
        assert run.process.wait(60) == TRY_AGAIN
    finally:
        run.end()
