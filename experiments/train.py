"""Trains a model with a communication method on simulated or real workers; the main job.

    python -m experiments.train --config=configs/digits_ef21.py [--config.steps=500] [--workdir=DIR]

Writes WORKDIR/metrics.jsonl, summary.json, checkpoints and TensorBoard events. Started again, an
interrupted run goes on from its last checkpoint bit for bit, and a finished one does nothing.
"""

import contextlib
import json
import logging as std_logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import config_flags

from experiments import command_line, job
from experiments.config import Config
from experiments.devices import (
    check_devices,
    connect_devices,
    setup_devices,
    with_workers,
    worker_devices,
    worker_mesh,
)
from experiments.expressions import evaluate as expression
from experiments.processes import UNSAVED
from experiments.schedules import learning_rate
from experiments.tasks import Task, make_task
from jaxcomm.sync import SyncRule
from jaxcomm.traffic.link import Link
from jaxcomm.training.checkpoint import Checkpointer, StorageError
from jaxcomm.training.distributed import initialize
from jaxcomm.training.elastic import HEARTBEAT_SECONDS, ElasticStep, prepare
from jaxcomm.training.local_checkpoint import LocalCheckpointer
from jaxcomm.training.loop import put_batch, train_loop
from jaxcomm.training.make import make_train_step
from jaxcomm.training.metrics import MetricsLogger, device_arithmetic, prepare_workdir
from jaxcomm.training.pacing import pace
from jaxcomm.training.step import TrainState, TrainStep
from jaxcomm.training.straggler_monitor import StragglerMonitor, step_alone
from jaxcomm.training.watchdog import WATCHED, Watchdog, give_up

MODES = ("devices", "simulate", "pmap")
# may differ between two parts of one run
FREE = ("checkpoint_every", "keep", "log_every", "evaluate_every", "mode", "background")
FREE += ("on_failure", "snapshot_every", "stuck_seconds", "standstill_seconds")
FREE += ("resize", "check_every", "local_checkpoints", "monitor", "pace")
MONITORS = ("", "processor", "step")
ON_FAILURE = ("stop", "restart", "continue")
COUNTER = "JAXCOMM_COUNTER"


def make_step(config: Config, loss_fn, devices: list[Any] | None = None) -> TrainStep:
    """The train step that the config describes; see `configs/common.py` for its fields.

    With `devices` it has one worker on each of them, whatever the config's number.
    """
    if config.mode not in MODES:
        raise ValueError(f"config.mode must be one of {', '.join(MODES)}, got {config.mode!r}")
    if config.mode != "devices" and jax.process_count() > 1:
        raise ValueError(
            f"config.mode must be 'devices' in a job of {jax.process_count()} processes, "
            f"got {config.mode!r}"
        )
    if config.on_failure not in ON_FAILURE:
        raise ValueError(
            f"config.on_failure must be one of {', '.join(ON_FAILURE)}, got {config.on_failure!r}"
        )
    if config.monitor not in MONITORS:
        raise ValueError(f"config.monitor must be one of {MONITORS}, got {config.monitor!r}")
    if config.pace:
        Link.parse(config.pace)
    scope = {
        "axis_name": config.axis_name,
        "learning_rate": learning_rate(config),
        "steps": config.steps,
        "warmup_steps": config.learning_rate.warmup_steps,
        "workers": len(devices) if devices else config.workers,
    }
    tx = expression(config.tx, "config.tx", **scope)
    sync = expression(config.sync, "config.sync", **scope) if config.sync else None
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"config.tx must be an Optax transform, got {config.tx!r}")
    if not isinstance(sync, SyncRule | None):
        raise ValueError(f"config.sync must be a sync rule or empty, got {config.sync!r}")
    way: dict[str, Any] = {"simulate": config.workers}
    if config.mode != "simulate":
        check_devices(config)
        pmap = config.mode == "pmap"
        way = {"pmap": config.workers} if pmap else {"mesh": worker_mesh(config, devices)}
    way["background"] = config.background
    return make_train_step(loss_fn, tx, axis_name=config.axis_name, sync=sync, **way)


def train_and_evaluate(config: Config, workdir: str) -> dict[str, Any]:
    """Runs the training that the config describes and returns its summary."""
    silence = config.stuck_seconds
    if config.on_failure == "continue" and silence:  # by then JAX's service knows that it is dead
        silence = max(silence, HEARTBEAT_SECONDS + 1.0)
    with (
        Watchdog(silence, config.standstill_seconds) as watchdog,
        contextlib.ExitStack() as held,
    ):
        return _run(config, workdir, watchdog, held)


def _run(
    config: Config, workdir: str, watchdog: Watchdog, held: contextlib.ExitStack
) -> dict[str, Any]:
    with _named_failures(watchdog):
        job.agree(config)
        config = with_workers(config)
        connections = connect_devices(config)
        if done := _finished(config, workdir):
            return done
        prepare_workdir(workdir)
        held.enter_context(job.claimed(workdir))
        task = make_task(config)
        elastic = config.on_failure == "continue" and jax.process_count() > 1
        step: Any = (
            _elastic(config, task.loss_fn, watchdog, connections)
            if elastic
            else make_step(config, task.loss_fn)
        )
        params = jax.device_get(task.init(jax.random.key(config.seed)))
        state = step.init(params, jax.random.key(config.seed + 1))
        data = task.train_iterator(
            config.batch_size, config.seed, jax.process_index(), jax.process_count()
        )
        every_line = _every_line(config, task, step, state)
    main = jax.process_index() == 0
    counter = _counter()
    with (
        _leaving(step),
        _checkpointer(config, workdir, elastic) as checkpointer,
        MetricsLogger(workdir, total_steps=config.steps, is_main=main) as logger,
        _named_failures(watchdog),
    ):
        run = train_loop(
            step,
            state,
            data,
            steps=config.steps,
            logger=logger,
            checkpointer=checkpointer,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            evaluate=task.evaluate,
            evaluate_every=config.evaluate_every,
            resize=config.resize or elastic,
            check_every=config.check_every,
            watchdog=watchdog,
            monitor=every_line,
        )
        if run.interrupted:
            name = signal.Signals(run.interrupted).name
            print(f"stopped at step {int(run.state.step)} by {name}; the state is saved")
            sys.exit(128 + run.interrupted)
        _, (params, skipped) = step.together(
            lambda state: (step.consensus(state), int(state.skipped.sum())), run.state
        )
        summary = {
            "steps": config.steps,
            "sync_step": run.sync_step,
            "workers": config.workers,
            **task.evaluate(params),
            "sent_bytes": run.sent_bytes,
            "largest_step_bytes": run.largest_step_bytes,
            "dense_bytes": run.dense_bytes,
            "dense_over_sent": run.dense_bytes / max(run.sent_bytes, 1),
            "seconds": run.seconds,
            "skipped": skipped,
            **_counted(counter, step),
            **{k: task.metadata[k] for k in ("unigram_entropy",) if k in task.metadata},
            "task": task.metadata,
            "device": device_arithmetic(),
            "config": config.to_dict(),
        }
        logger.summary(summary)
    return summary


@contextlib.contextmanager
def _leaving(step: Any):
    """A process that may have outlived others cannot end like any other."""
    code = 0
    try:
        yield
    except SystemExit as error:
        if not isinstance(step, ElasticStep):
            raise
        code = int(error.code or 0)
    if isinstance(step, ElasticStep):
        step.leave(code)


def _every_line(config: Config, task: Task, step: Any, state: TrainState) -> Callable | None:
    """What happens among several processes at every line of metrics."""
    if jax.process_count() == 1:
        return None
    monitor = _monitor(config, task, step, state)

    def look(done: int, seconds: float) -> None:
        if config.pace:
            pace(config.pace)  # connections may be new: gloo opens them when they are needed
        if monitor is not None:
            monitor(done, seconds, getattr(step, "lost", ()))

    return look


def _monitor(config: Config, task: Task, step: Any, state: TrainState) -> Callable | None:
    """What compares the times of several processes."""
    if not config.monitor:
        return None
    compute = None
    if config.monitor == "step":
        parts = jax.process_index(), jax.process_count()
        batch = next(task.train_iterator(config.batch_size, config.seed, *parts))
        compute = step_alone(step, state, put_batch(step, batch))
    return StragglerMonitor(compute)


def _checkpointer(config: Config, workdir: str, elastic: bool) -> Checkpointer | LocalCheckpointer:
    options = {"config": _fixed(config), "workers": config.workers, "keep": config.keep}
    shared = Path(workdir) / "checkpoints"
    writers = "first" if elastic else "all"
    checkpointer = Checkpointer(shared, writers=writers, **options)
    if not config.local_checkpoints:
        return checkpointer
    return LocalCheckpointer(config.local_checkpoints, checkpointer, **options)


@contextlib.contextmanager
def _named_failures(watchdog: Watchdog):
    """Among several processes, a failed collective or save ends this one with one sentence.

    What goes wrong after the first step is no mistake in the config: another attempt may go well.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, StorageError) as error:
        if jax.process_count() == 1:
            raise
        line = str(error).strip().splitlines()[0]
        if culprit := watchdog.blame():
            give_up(f"{culprit} ({line})")
        if isinstance(error, StorageError):
            give_up(line, UNSAVED)
        raise
    except (ValueError, OSError) as error:
        if jax.process_count() > 1 and watchdog.started:
            raise RuntimeError(f"the run failed: {error}") from error
        raise


def _fixed(config: Config) -> dict[str, Any]:
    """The part of the config that must not change within a run."""
    return {k: v for k, v in config.to_dict().items() if k not in FREE}


def _finished(config: Config, workdir: str) -> dict[str, Any] | None:
    path = Path(workdir) / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to go on") from error
    same = json.loads(json.dumps(_fixed(config), default=list))
    old = {k: v for k, v in summary.get("config", {}).items() if k not in FREE}
    if config.resize:
        old["workers"] = same["workers"]
    if old != same:
        names = sorted(k for k in old.keys() | same.keys() if old.get(k) != same.get(k))
        raise ValueError(
            f"{workdir} holds a finished run of another config (it differs in "
            f"{', '.join(names)}): give another --workdir"
        )
    print(f"{workdir} is finished: nothing to do")
    return summary


def _counted(before: int | None, step: Any) -> dict[str, int]:
    """What this host's interface has transmitted since, if there is a counter."""
    lost = getattr(step, "lost", ())
    if before is None or lost:  # who waits for the dead waits long
        return {"lost_processes": len(lost)} if lost else {}
    multihost_utils.sync_global_devices("counter")  # until then others may still be receiving
    return {"counter_bytes": (_counter() or 0) - before}


def _counter() -> int | None:
    path = os.environ.get(COUNTER)
    return int(Path(path).read_text()) if path else None


def _elastic(config: Config, loss_fn, watchdog: Watchdog, connections) -> ElasticStep:
    """A step that outlives some of its processes."""
    if config.mode != "devices" or config.background:
        raise ValueError("config.on_failure=continue needs config.mode=devices, background=False")
    return ElasticStep(
        lambda devices: make_step(config, loss_fn, devices),
        worker_devices(config),
        every=config.snapshot_every,
        watchdog=watchdog,
        connections=connections,
    )


def default_workdir(config_flag: str) -> str:
    """runs/<config name>, with the argument behind the colon if there is one."""
    path, _, argument = config_flag.partition(":")
    return os.path.join("runs", Path(path).stem + (f"_{argument}" if argument else ""))


def main(_: list[str]) -> None:
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    config = FLAGS.config
    job.export()
    setup_devices(config)
    initialize(**(prepare() if config.on_failure == "continue" else WATCHED))
    workdir = FLAGS.workdir or default_workdir(config_flags.get_config_filename(FLAGS["config"]))
    if config.on_failure != "stop":
        job.keep_programs(str(Path(workdir).absolute() / "compiled"))
    train_and_evaluate(config, workdir)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where results go; default runs/<config name>.")
    flags.mark_flag_as_required("config")
    job.define_flags()
    command_line.run(main)
