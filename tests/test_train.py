"""The main job: from a config to a summary, through kills, restarts and mistakes."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import host, same

import configs
from experiments import devices
from experiments.tasks import make_task
from experiments.train import make_step, train_and_evaluate
from jaxcomm.traffic import traffic
from jaxcomm.training.checkpoint import Checkpointer
from jaxcomm.training.step import TrainStep

ROOT = Path(__file__).parents[1]
LONG = {"lm_ef21", "lm_qsr"}  # tested for what they learn
STEPS = 40


def load(name, **fields):
    """The smoke config of that name, with other values."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    config.update(fields)
    return config


def training_configs():
    """Configs of this binary: those that name a chain."""
    names = sorted(path.stem for path in Path(configs.__path__[0]).glob("*.py"))
    modules = {name: importlib.import_module(f"configs.{name}") for name in names}
    loaded = {n: m.get_config("smoke") for n, m in modules.items() if hasattr(m, "get_config")}
    return [name for name, config in loaded.items() if "tx" in config and "task" in config]


NAMES = training_configs()


def rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir):
    """metrics.jsonl without wall times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(workdir)]


def latest(workdir):
    """The step of the last checkpoint."""
    with Checkpointer(Path(workdir) / "checkpoints") as checkpointer:
        return checkpointer.latest()


def files(workdir):
    return {p: p.stat().st_mtime_ns for p in Path(workdir).rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("digits_ef21", "mlp"),  # compiles in half the time
        *(pytest.param(n, "", marks=pytest.mark.slow) for n in NAMES if n not in LONG),
    ],
)
def test_smoke(name, kind, tmp_path, capsys):
    steps = 10
    config = load(name, steps=steps, log_every=4, evaluate_every=5, checkpoint_every=4)
    config.learning_rate.warmup_steps = 2
    if kind:
        config.task.model.kind = kind
    summary = train_and_evaluate(config, str(tmp_path))
    check_outputs(config, tmp_path, summary)
    check_bytes(config, rows(tmp_path))
    assert [r["step"] for r in rows(tmp_path)] == [4, 5, 8, 10]
    assert [r["step"] for r in rows(tmp_path) if "validation_loss" in r] == [5, 10]
    # started again, it does nothing
    before = files(tmp_path)
    again = train_and_evaluate(config, str(tmp_path))
    assert again == json.loads((tmp_path / "summary.json").read_text())
    assert files(tmp_path) == before
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["simulate", "pmap"])
def test_several_processes_have_workers_on_devices_only(mode, monkeypatch):
    """Each of them would train on its own part of the batch alone."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=f"'devices' in a job of 2 processes, got '{mode}'"):
        make_step(load("digits_ef21", mode=mode), None)


@pytest.mark.parametrize(("rank", "sets"), [(0, [5, 4, 1]), (1, [5, 4])])
def test_a_process_connects_only_devices_of_which_it_has_some(rank, sets, monkeypatch):
    owned = [mock.Mock(process_index=i) for i in (0, 0, 0, 1, 1)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: rank)
    monkeypatch.setattr(jax, "devices", lambda: owned)
    connected = []
    monkeypatch.setattr(devices, "connect", lambda some: connected.append(len(some)))
    devices.connect_devices(load("digits_ef21", workers=4))
    assert connected == sets


@pytest.mark.parametrize(
    ("counts", "workers", "fits"),
    [
        ((2, 2), 4, True),
        ((2, 2), 2, True),
        ((2, 2), 3, False),
        ((2, 2), 6, False),
        ((3, 1), 4, False),
        ((3, 2), 4, False),
    ],
)
def test_every_process_has_as_many_devices_and_workers(counts, workers, fits, monkeypatch):
    owned = [mock.Mock(process_index=i) for i, count in enumerate(counts) for _ in range(count)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: owned)
    words = f"={workers} does not fit {counts[0]} .+ {counts[1]} devices in 2 processes"
    expected = pytest.raises(ValueError, match=words)
    with contextlib.nullcontext() if fits else expected:
        devices.check_devices(load("digits_ef21", workers=workers))


def check_outputs(config, workdir, summary):
    """The files that the design promises, and that their figures agree."""
    stored = json.loads((workdir / "summary.json").read_text())
    assert stored["steps"] == summary["steps"] == config.steps
    assert stored["workers"] == config.workers
    assert np.isfinite(stored["validation_loss"])
    assert 0 <= stored["validation_accuracy"] <= 1
    assert stored["device"]["platform"] == jax.devices()[0].platform
    assert stored["config"]["tx"] == config.tx
    assert stored["config"]["learning_rate"]["peak"] == config.learning_rate.peak
    logged = rows(workdir)
    for row in logged:
        assert {"step", "loss", "sent_bytes", "seconds", "sync_step"} <= row.keys()
    for field in ("sent_bytes", "seconds", "sync_step", "step"):
        values = [row[field] for row in logged]
        assert values == sorted(values), field
    assert logged[-1]["sent_bytes"] == stored["sent_bytes"] > 0
    assert latest(workdir) == config.steps
    assert list((workdir / "tensorboard").iterdir())


def check_bytes(config, logged):
    """sent_bytes is the count of the traced program, and no figure of the binary's own."""
    task, key = make_task(config), jax.random.key(0)
    step = make_step(config, task.loss_fn)
    state = step.abstract_state(jax.eval_shape(task.init, key), key)
    report = traffic(step, state, next(task.train_iterator(config.batch_size, 0)))
    for row in logged:
        low, high = report.smallest_step_bytes, report.largest_step_bytes
        assert row["step"] * low <= row["sent_bytes"] <= row["step"] * high
        if not report.choices:
            assert row["sent_bytes"] == row["step"] * report.every_step_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_language_models_learn_more_than_frequencies(name, tmp_path, capsys):
    summary = train_and_evaluate(load(name), str(tmp_path))
    print(f"{name}: {summary['validation_loss']:.3f}, unigrams {summary['unigram_entropy']:.3f}")
    assert summary["validation_loss"] < summary["unigram_entropy"] - 0.5
    printed = capsys.readouterr().out
    assert "validation_loss" in printed
    assert "unigram_entropy" in printed


# Kills.


def resumable(name, kind="default", **fields):
    config = load(name, steps=STEPS, log_every=1, checkpoint_every=4, evaluate_every=0, **fields)
    if kind == "mlp":
        config.task.model.kind = "mlp"  # compiles in half the time
    return config


def start(name, kind, workdir):
    """The same run as a process of its own."""
    fields = [f"--config.steps={STEPS}", "--config.log_every=1", "--config.checkpoint_every=4"]
    fields += ["--config.evaluate_every=0"]
    fields += ["--config.task.model.kind=mlp"] if kind == "mlp" else []
    command = ["-m", "experiments.train", f"--config=configs/{name}.py:smoke", *fields]
    return subprocess.Popen(
        [sys.executable, *command, f"--workdir={workdir}"],
        cwd=ROOT,
        # as many devices as here: XLA shares its threads among them, which decides about last bits
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(process, workdir, signum, step=10):
    """Sends the signal once that step is logged; returns the exit code."""
    path = Path(workdir) / "metrics.jsonl"
    with process:
        while not path.exists() or path.read_bytes().count(b"\n") < step:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signum)
        process.communicate()
    return process.returncode


def final(config, workdir):
    """Every leaf of the last checkpoint, the data position and the bytes sent."""
    task = make_task(config)
    step = make_step(config, task.loss_fn)
    key = jax.random.key(0)
    shapes = step.abstract_state(jax.eval_shape(task.init, key), key)
    zeros = lambda x: key if x.dtype == key.dtype else jnp.zeros(x.shape, x.dtype)
    with Checkpointer(Path(workdir) / "checkpoints") as checkpointer:
        found, position, extra = checkpointer.restore(jax.tree.map(zeros, shapes), config.steps)
    return host(found), position, extra["sent_bytes"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs that nothing interrupts."""
    done = {}

    def get(*which):
        if which not in done:
            done[which] = tmp_path_factory.mktemp("straight")
            train_and_evaluate(resumable(*which), str(done[which]))
        return done[which]

    return get


@pytest.fixture
def ctrl_c():
    """Children would inherit that who runs these tests ignores it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def kill(name, kind, signum):
    return pytest.param(name, kind, signum, id=f"{name}-{kind}-{signum.name}")


@pytest.mark.slow
@pytest.mark.parametrize(  # test_resume.py has one that is always run
    ("name", "kind", "signum"),
    [
        kill("digits_ef21", "mlp", signal.SIGKILL),
        kill("digits_local_sgd", "mlp", signal.SIGTERM),
        kill("digits_ef21", "default", signal.SIGINT),
        kill("digits_qsr", "default", signal.SIGKILL),
        kill("digits_sign_ef", "default", signal.SIGKILL),
        kill("lm_ef21", "default", signal.SIGKILL),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(
    name, kind, signum, straight, tmp_path, monkeypatch, ctrl_c
):
    config, workdir, want = resumable(name, kind), tmp_path / "run", straight(name, kind)
    code = interrupt(start(name, kind, workdir), workdir, signum)
    assert code == (-9 if signum == signal.SIGKILL else 128 + signum)
    assert not (workdir / "summary.json").exists()
    logged = rows(workdir)[-1]["step"]
    saved = latest(workdir)
    assert 4 <= saved <= logged < STEPS
    if signum != signal.SIGKILL:
        assert saved == logged  # at once, not at the next multiple of four
    if signum == signal.SIGKILL:
        refuses_others(name, kind, workdir, "was written by 4 workers", "seed")

    taken = []
    monkeypatch.setattr(
        TrainStep, "__call__", lambda *args, old=TrainStep.__call__: taken.append(1) or old(*args)
    )
    train_and_evaluate(config, str(workdir))
    assert len(taken) == STEPS - saved
    mine, theirs = final(config, workdir), final(config, want)
    assert same(mine[0], theirs[0])
    assert mine[1:] == theirs[1:]
    assert timeless(workdir) == timeless(want)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (workdir, want)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]
    refuses_others(name, kind, workdir, "differs in workers", "differs in seed")


def refuses_others(name, kind, workdir, workers, seed):
    """Another number of workers or another config is told so, in one sentence; nothing changes."""
    before = files(workdir)
    for fields, match in [({"workers": 2}, workers), ({"seed": 5}, seed)]:
        with pytest.raises(ValueError, match=match) as error:
            train_and_evaluate(resumable(name, kind, **fields), str(workdir))
        assert "\n" not in str(error.value)
    assert files(workdir).keys() == before.keys()
