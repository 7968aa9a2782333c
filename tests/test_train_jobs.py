"""The main job in real processes: one that is slow is named, one that is gone is done without."""

import json
import re
from pathlib import Path

import ml_collections
import pytest

from configs import common
from experiments import cluster
from experiments.devices import with_workers
from experiments.train import train_and_evaluate
from jaxcomm.training.checkpoint import Checkpointer
from tests.planted import DEATH

STEPS = 14
SLOW = "process 1 is slow in computation"


def smoke(**fields):
    config = common.digits("smoke")
    config.tx = "optax.chain(ef21(top_k(0.1), axis_name), optax.sgd(learning_rate))"
    config.update(fields)
    return config


def launch(workdir, hosts, part, *, fields=(), **options):
    """A job of processes that run `tests.planted`."""
    fixed = {"task.model.kind": "mlp", "steps": STEPS, "checkpoint_every": 2, "log_every": 1}
    fixed |= {"evaluate_every": 0, "batch_size": 60, "workers": 0, **dict(fields)}
    words = ["--config=configs/digits_ef21.py:smoke", f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in fixed.items()]
    job = cluster.Job(("-m", "tests.planted", part, *words), hosts, timeout=200.0, **options)
    return cluster.launch(job)


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


@pytest.mark.slow
def test_the_slow_process_is_named(tmp_path, capfd):
    """The real wiring: both measure their part of the step, and rank 1's takes longer."""
    report = launch(tmp_path, 2, "slow", fields={"steps": 6, "monitor": "step"})
    assert report.outcome.exit_code == 0
    found = [line for line in capfd.readouterr().err.splitlines() if SLOW in line]
    assert found
    assert all(line.startswith("[0]") for line in found)
    assert json.loads((tmp_path / "summary.json").read_text())["workers"] == 2


@pytest.mark.slow
def test_the_monitor_goes_on_after_a_loss(tmp_path, capfd):
    """Three processes, of which one is slow and one dies; nobody is compared with the dead."""
    fields = {"monitor": "step", "on_failure": "continue", "checkpoint_every": 0}
    report = launch(tmp_path, 3, "slow, dies", fields=fields, losses=1)
    assert report.outcome.exit_code == 0, report.outcome
    named = {rank: [] for rank in range(3)}  # a busy machine may name others now and then
    for line in capfd.readouterr().err.splitlines():
        if match := re.search(r"step (\d+): process (\d) is slow", line):
            named[int(match[2])].append(int(match[1]))
    assert min(named[1]) < DEATH < max(named[1])
    assert max(named[2], default=0) <= DEATH
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["lost_workers"] == 1


@pytest.mark.slow
def test_a_job_goes_on_with_the_hosts_that_are_left(tmp_path):
    """Rank 2 dies for good: the third attempt has two hosts, two workers, and the next steps."""
    fields = {"resize": True, "on_failure": "restart"}
    report = launch(tmp_path, 3, "dies", fields=fields, restarts=5, fewer_hosts=2)
    assert report.outcome.exit_code == 0, report.outcome
    assert len(report.outcome.ranks) == 2
    reasons = [str(outcome.reason) for outcome in report.failures]
    assert ["rank 2 was killed by SIGKILL" in reason for reason in reasons] == [True, True]
    begins = [int((tmp_path / f"begin{attempt}").read_text()) for attempt in range(3)]
    assert begins[0] == 1
    assert 1 < begins[1] <= DEATH
    assert begins[1] <= begins[2] <= DEATH
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["workers"], summary["config"]["workers"], summary["steps"]) == (2, 2, STEPS)
    with Checkpointer(tmp_path / "checkpoints", workers=2) as checkpointer:
        assert checkpointer.latest() == STEPS


def test_as_many_workers_as_devices():
    config = smoke(workers=0, batch_size=64)
    assert with_workers(config).workers == 8
    rule = {"background": True, "sync": "eager_diloco(axis_name, 5)"}  # two devices a worker
    assert with_workers(smoke(workers=0, batch_size=64, **rule)).workers == 4
    assert with_workers(smoke(workers=0, batch_size=64, background=True)).workers == 8
    assert with_workers(smoke(workers=0, batch_size=64, mode="pmap")).workers == 8
    assert config.workers == 0
    assert with_workers(smoke(workers=3, batch_size=63)).workers == 3
    assert isinstance(with_workers(config), ml_collections.ConfigDict)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"workers": 0, "mode": "simulate"}, "simulated workers need a number"),
        ({"workers": 0, "batch_size": 60}, "batch_size=60 is not divisible by config.workers=8"),
        ({"monitor": "all"}, r"config.monitor must be one of .* got 'all'"),
    ],
)
def test_refused(fields, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        train_and_evaluate(smoke(**fields), str(tmp_path))
