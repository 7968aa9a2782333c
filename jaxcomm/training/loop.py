"""The loop: steps, metrics, checkpoints; stops at SIGTERM or Ctrl-C, goes on where it stopped.

Everything that decides the trajectory (state, data position, bytes sent so far) is in the
checkpoint, so that N steps equal k steps, a kill, and N - k more, bit for bit.
"""

import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcomm.traffic import Traffic, traffic
from jaxcomm.training.checkpoint import Checkpointer
from jaxcomm.training.consistency import ReplicaCheck
from jaxcomm.training.elastic import ElasticStep
from jaxcomm.training.local_checkpoint import LocalCheckpointer
from jaxcomm.training.metrics import MetricsLogger, Stopwatch
from jaxcomm.training.step import TrainState, TrainStep
from jaxcomm.training.watchdog import Watchdog
from jaxcomm.training.workers import Place


class Run(NamedTuple):
    """How a loop ended."""

    state: TrainState
    sync_step: int  # meetings of the replicas
    sent_bytes: float  # by one worker, since step 0
    largest_step_bytes: float  # of the dearest step
    dense_bytes: float  # that averaging float32 gradients in every step would have sent
    seconds: float  # wall time since the first step ended, earlier parts of the run included
    interrupted: int  # the signal after which the state was saved; 0 for none


def train_loop(
    step: TrainStep,
    state: TrainState,
    data,
    *,
    steps: int,
    logger: MetricsLogger,
    checkpointer: Checkpointer | LocalCheckpointer | None = None,
    log_every: int = 10,
    checkpoint_every: int = 0,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    resize: bool = False,
    check_every: int = 0,
    watchdog: Watchdog | None = None,
    monitor: Callable[[int, float], Any] | None = None,
) -> Run:
    """Trains up to `steps` steps, from the last checkpoint if there is one.

    Args:
      step: the train step.
      state: its initial state (also the pattern for restoring).
      data: iterator over this process's share of global batches, with `get_state`/`set_state`.
      steps: last step.
      logger: where metrics go.
      checkpointer: saves every `checkpoint_every` steps, at the end, and on SIGTERM or Ctrl-C.
      log_every: steps between two lines of metrics.
      checkpoint_every: steps between two saves; 0 saves at the end only.
      evaluate: validation metrics of one parameter tree, logged every `evaluate_every` steps.
      evaluate_every: steps between two evaluations; 0 for none.
      resize: a checkpoint may be of another number of workers; see `resize_workers`.
      check_every: steps between two comparisons of the replicas' bits (`ReplicaCheck`), which also
        precede every save; 0 for none.
      watchdog: is told of every step.
      monitor: is called with the step and its `seconds` after every line of metrics, on every
        process (`StragglerMonitor`).

    Raises:
      ValueError: `log_every` is less than 1.
    """
    if log_every < 1:
        raise ValueError(f"log_every must be at least 1 step, got {log_every}")
    if watchdog is not None:
        watchdog.step(0)
    account, clock, seconds = Account(step), Stopwatch(), 0.0
    if checkpointer is not None and checkpointer.latest() is not None:
        state, position, extra = checkpointer.restore(state, resize=resize)
        data.set_state(position)
        account.total, seconds = extra["sent_bytes"], extra["seconds"]
        account.dense = extra.get("dense_bytes")  # None: of a version that did not save it
        clock = Stopwatch(seconds)
    done = int(state.step)
    logger.truncate(done)
    started, check = False, ReplicaCheck()

    def save(state):
        if checkpointer is None:
            return
        if check_every and done % check_every:  # else it has just been done
            check(state)
        extra = {"sent_bytes": account.settle(), "seconds": seconds, "dense_bytes": account.dense}
        checkpointer.save(done, state, data_state=data.get_state(), extra=extra)

    with _StopSignal(step) as stop:
        while done < steps:
            batch = put_batch(step, next(data))
            account.see(state, batch)
            checking = check_every and (done + 1) % check_every == 0
            met = meetings(state) if checking else 0
            state, metrics = step(state, batch)
            done += 1
            if checking:
                met = meetings(state) > met
                state, _ = step.together(functools.partial(check, met=met), state)
            if watchdog is not None:
                watchdog.step(done)
            account.add(metrics)
            last = done == steps
            evaluating = evaluate_every and done % evaluate_every == 0
            logging = last or evaluating or done % log_every == 0
            if logging or not started:  # the clock starts when the first step has ended
                jax.block_until_ready(metrics)
                started = True
            seconds = clock()
            if logging:
                values = _line(metrics, state, account, seconds)
                if evaluate and evaluating:
                    state, params = step.together(lambda state: step.consensus(state), state)
                    values |= evaluate(params)
                logger.log(done, values)
                if monitor is not None:
                    monitor(done, seconds)
            stopping = stop.requested()
            if last or stopping or (checkpoint_every and done % checkpoint_every == 0):
                state, _ = step.together(save, state)
            if stopping and not last:
                break
        if checkpointer is not None:
            state, _ = step.together(lambda _: checkpointer.wait(), state)  # one may write for all
    if account.unseen:  # the last checkpoint was the end
        account.see(state, put_batch(step, next(data)))
    sent, largest = account.settle(), account.report.largest_step_bytes
    interrupted = stop.number if done < steps else 0
    return Run(state, meetings(state), sent, largest, account.dense, seconds, interrupted)


class Account:
    """Bytes one worker has sent, from the traced program and the branches that really ran."""

    def __init__(self, step: TrainStep):
        self.total, self.dense = 0.0, 0.0
        self._step, self._traffic, self._branches = step, None, []
        self._count = step.workers.count

    @property
    def unseen(self) -> bool:
        """Whether no step was traced yet."""
        return self._traffic is None

    def see(self, state: TrainState, batch) -> None:
        """Traces the step, once for every number of workers."""
        if self._count != self._step.workers.count:
            self.settle()
            self._count, self._traffic = self._step.workers.count, None
        if self.unseen:
            self._traffic = traffic(self._step, state, batch)
        if self.dense is None:
            self.dense = int(state.step) * self.report.dense_equivalent_bytes

    def add(self, metrics: dict) -> None:
        """Counts a step."""
        self.dense += self.report.dense_equivalent_bytes
        if self.report.choices:
            self._branches.append(metrics["branches"])
        else:
            self.total += self.report.every_step_bytes

    def settle(self) -> float:
        """The total so far, bytes; waits for the steps whose branches are not known yet."""
        for branches in self._branches:
            self.total += self.report.step_bytes(np.asarray(branches))
        self._branches = []
        return int(self.total) if float(self.total).is_integer() else self.total

    @property
    def report(self) -> Traffic:
        """The traffic of the step, once it was seen."""
        assert self._traffic is not None
        return self._traffic


def put_batch(step: TrainStep, batch):
    """This process's rows as part of the global batch (a no-op with one process)."""
    sharding = step.workers.sharding(Place.SPLIT)
    if jax.process_count() == 1 or sharding is None:
        return batch
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _line(metrics: dict, state: TrainState, account: Account, seconds: float) -> dict:
    shown = {k: np.asarray(v) for k, v in metrics.items() if k != "branches"}
    values = {k: v.item() for k, v in shown.items() if v.size == 1}
    figures = {"sent_bytes": account.settle(), "seconds": seconds, "sync_step": meetings(state)}
    return {**values, **figures}


def meetings(state: TrainState) -> int:
    """How often the replicas have met: what the sync rule counts, or every step."""
    return int(getattr(state.sync_state, "sync_step", state.step))


class _StopSignal:
    """SIGTERM asks for a stop at the next step; several processes agree on which one.

    One process is asked by Ctrl-C as well; a second Ctrl-C ends it at once. JAX's way to agree
    would wait for the dead: an ElasticStep has its own. It counts the calls, of this part of a run,
    so that a signal before the first of them is not missed.
    """

    def __init__(self, step: Any):
        self.number = int(signal.SIGTERM)  # the signal that was heard, if one was
        self._asked, self._calls = threading.Event(), itertools.count(1)
        self._elastic = step if isinstance(step, ElasticStep) else None
        self._ask = self._elastic.ask_to_stop if self._elastic else self._asked.set
        self._old: dict[int, Any] = {}

    def __enter__(self):
        alone = self._elastic is None and jax.process_count() == 1
        numbers = [signal.SIGTERM] if alone or self._elastic else []
        if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def _hear(self, number: int, _) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")
        self._ask()

    def __exit__(self, *_):
        for number, old in self._old.items():
            if old is not None:
                signal.signal(number, old)

    def requested(self) -> bool:
        if self._elastic is not None:
            return self._elastic.stopping()
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._asked.is_set()
