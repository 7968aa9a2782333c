"""A mistake of the user in a job of real processes: one sentence, code 2, no other attempt."""

import errno
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cluster, command_line, train
from jaxcomm.training.checkpoint import Checkpointer, CheckpointError, StorageError
from jaxcomm.training.metrics import WorkdirError, prepare_workdir
from jaxcomm.training.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
PROGRAM = """
from experiments import command_line
from jaxcomm.training.distributed import initialize, rank
command_line._WAIT = {wait}
def main(_):
    initialize()
    {body}
command_line.run(main)
"""


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def launch(capfd, *arguments, **options):
    """A job of two processes that may be started again; its outcome, and the lines of stderr."""
    options = {"hosts": 2, "timeout": 120.0, "restarts": 3, "losses": 1, **options}
    report = cluster.launch(cluster.Job(arguments, **options))
    assert report.failures == ()
    err = capfd.readouterr().err
    return report.outcome, [line for line in err.splitlines() if "error" in line.lower()], err


def program(body, wait=10_000):
    return "-c", PROGRAM.format(body=body, wait=wait)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            ("steps=20", "learning_rate.warmup_steps=20", "workers=0", "on_failure=continue"),
            "config.learning_rate.warmup_steps must be in [0, config.steps=20), got 20",
        ),
        pytest.param(
            ("workers=0", "batch_size=63"),
            "config.batch_size=63 is not divisible by config.workers=2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("workers=2", "tx=optax.chain(ef21(top_k(k=10**7), axis_name), optax.sgd(0.1))"),
            "k must be at most the vector's size, got k=10000000 for size 3466",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("workers=2", "log_every=0"),
            "log_every must be at least 1 step, got 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_process_0_says_it_once_for_all(fields, sentence, tmp_path, capfd):
    words = ["-m", "experiments.train", "--config=configs/digits_dense.py:smoke"]
    fields = ("task.model.kind=mlp", *fields)
    words += [f"--workdir={tmp_path}", *(f"--config.{field}" for field in fields)]
    outcome, errors, err = launch(capfd, *words)
    assert errors == [f"[0] error: {sentence}"]
    assert outcome.exit_code == cluster.MISTAKE
    assert "Traceback" not in err


def test_who_is_alone_with_a_mistake_says_it(capfd):
    """Process 1 lacks a file; process 0, which waits for it, is ended."""
    body = "open('/no/such/file') if rank() else __import__('time').sleep(60)"
    outcome, errors, _ = launch(capfd, *program(body, wait=300))
    assert errors == ["[1] error: [Errno 2] No such file or directory: '/no/such/file'"]
    assert outcome.exit_code == cluster.MISTAKE
    assert outcome.ranks[0].stopped


@pytest.mark.slow
def test_who_has_made_another_one_says_that_too(capfd):
    outcome, errors, _ = launch(capfd, *program("open(f'/no/such/file{rank()}')"))
    file = "error: [Errno 2] No such file or directory: '/no/such/file"
    assert sorted(errors) == [f"[0] {file}0'", f"[1] {file}1'"]
    assert outcome.exit_code == cluster.MISTAKE


@pytest.mark.slow
def test_a_checkpoint_of_another_config_is_a_mistake_and_not_a_failed_save(tmp_path, capfd):
    with Checkpointer(tmp_path / "checkpoints", config={"seed": 1}, workers=2) as checkpointer:
        checkpointer.save(1, {"w": np.ones(2)}, data_state=None)
    words = ["-m", "experiments.train", "--config=configs/digits_dense.py:smoke"]
    words += [f"--workdir={tmp_path}", "--config.workers=2", "--config.task.model.kind=mlp"]
    outcome, (error,), _ = launch(capfd, *words)
    assert re.match(r"\[0\] error: checkpoint of step 1 in .* this run has", error)
    assert outcome.exit_code == cluster.MISTAKE


def test_a_full_disk_is_no_mistake(monkeypatch, tmp_path):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(WorkdirError, match="No space left") as found:
        prepare_workdir(tmp_path)
    for error in (found.value, StorageError("checkpoint of step 3 was not written")):
        assert command_line.exit_code(error) == train.UNSAVED
    assert command_line.exit_code(CheckpointError("of another config")) == cluster.MISTAKE


@pytest.mark.parametrize(
    ("error", "steps", "raised", "code"),
    [
        (ValueError("a"), 0, ValueError, None),
        (CheckpointError("a"), 0, CheckpointError, None),
        (ValueError("a"), 1, RuntimeError, None),  # no mistake: another attempt may go well
        (OSError(5, "a"), 1, RuntimeError, None),
        (StorageError("a\nb"), 1, StorageError, train.UNSAVED),
        (StorageError("a\nb"), 0, StorageError, train.UNSAVED),
    ],
)
def test_what_fails_among_several(error, steps, raised, code, monkeypatch):
    """Before the first step has ended it is a mistake; a failed save or a run never is."""
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(train, "give_up", lambda *arguments: ended.append(arguments))
    watchdog = Watchdog(0.0)
    for step in range(steps):
        watchdog.step(step + 1)
    with pytest.raises(raised) as found, train._named_failures(watchdog):
        raise error
    assert found.type is raised
    assert ended == ([("a", code)] if code else [])
