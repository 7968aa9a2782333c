"""Per-process times of a run, gathered over the coordination service; a log line for the slow one.

Every process writes three numbers at each logged step and process 0 reads what is there: nobody
waits for anybody, no collective runs, some hundred bytes move. Without a wait a process that is
behind is judged by its last numbers. No trouble with the service ends a training.

What a step computes cannot be seen from outside, as the collective is part of the same program.
`step_alone` measures it: the same step of this process with the communication removed.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxcomm.traffic.alone import without_communication
from jaxcomm.training.distributed import client
from jaxcomm.training.stragglers import EVERYBODY, Finding, find_slow
from jaxcomm.training.workers import Place

PREFIX = "jaxcomm/times/"


class StragglerMonitor:
    """Call it at logged steps with `(step, seconds)`; process 0 finds and logs slow processes.

    Args:
      compute: measures the seconds that this process's part of a step computes (`step_alone`);
        None: a small fixed program, which tells slow processors but not communication.
      process: which one this is; default: as JAX says.
      processes: how many there are; default: as JAX says.
      store: has `key_value_set(key, value, allow_overwrite)` and `key_value_dir_get(prefix)`;
        default: JAX's coordination service.

    Example:
      >>> monitor = StragglerMonitor(compute=lambda: 0.25)
      >>> monitor(10, 5.0), monitor(20, 10.0)  # alone there is nobody to compare with
      ([], [])
    """

    def __init__(
        self,
        compute: Callable[[], float] | None = None,
        *,
        process: int | None = None,
        processes: int | None = None,
        store: Any = None,
    ):
        self._compute, self._whole = compute or _fixed_work(), compute is not None
        self._process = jax.process_index() if process is None else process
        self._processes = jax.process_count() if processes is None else processes
        self._store: Any = store if store is not None or self._processes == 1 else client()
        self._last: tuple[int, float] | None = None
        self._usual: float | None = None  # seconds of the shortest collective so far
        self._suspected = False  # whether everybody seemed slow the last time
        self.times = np.full((self._processes, 3), math.nan)  # step, compute, collective

    def __call__(self, step: int, seconds: float, lost: Sequence[int] = ()) -> list[Finding]:
        """Measures, writes, and on process 0 compares.

        Args:
          step: the step that has ended.
          seconds: wall time of the run so far.
          lost: processes that are not there any more, which the others are not compared with.

        Returns:
          What was found, on process 0; it is logged as well.
        """
        last, self._last = self._last, (step, seconds)
        if last is None or step <= last[0]:
            return []
        each = (seconds - last[1]) / (step - last[0])
        compute = self._compute()
        collective = max(each - compute, 0.0) if self._whole else math.nan
        try:
            self._exchange(f"{each!r} {compute!r} {collective!r}")
        except jax.errors.JaxRuntimeError as error:  # the next collective will say so as well
            logging.warning("step %d: no times: %s", step, str(error).splitlines()[0])
            return []
        if self._process:
            return []
        found = self._compare(lost)
        # once may have been an evaluation or a save between the two lines
        everybody = any(finding.process == EVERYBODY for finding in found)
        if everybody and not self._suspected:
            found = [finding for finding in found if finding.process != EVERYBODY]
        self._suspected = everybody
        for finding in found:
            logging.warning("step %d: %s", step, finding)
        return found

    def _compare(self, lost: Sequence[int]) -> list[Finding]:
        here = [i for i in range(self._processes) if i not in lost]
        times = self.times[here]
        found = find_slow(times[:, 1], times[:, 2], self._usual)
        self._remember(times[:, 2])
        named = [here[f.process] if f.process != EVERYBODY else EVERYBODY for f in found]
        return [f._replace(process=process) for f, process in zip(found, named)]

    def _exchange(self, mine: str) -> None:
        entries = [(f"{self._process}", mine)]
        if self._processes > 1:
            self._store.key_value_set(f"{PREFIX}{self._process}", mine, allow_overwrite=True)
            entries = self._store.key_value_dir_get(PREFIX) if not self._process else []
        for key, text in entries:
            self.times[int(key.rpartition("/")[2])] = [float(word) for word in text.split()]

    def _remember(self, collective: np.ndarray) -> None:
        if self._processes > 1 and np.isfinite(collective).any():
            shortest = float(np.nanmin(collective))
            self._usual = shortest if self._usual is None else min(self._usual, shortest)


def step_alone(step, state, batch) -> Callable[[], float]:
    """A function that runs this process's part of a step without communication, and times it.

    It compiles the step once more and keeps a copy of this worker's state. The median of three.

    Args:
      step: a TrainStep.
      state: its state, placed on the workers.
      batch: a global batch.
    """
    if step.workers.mode != "devices":
        raise ValueError("step_alone: only a step on devices has a part of this process's own")
    sizes = dict(zip(step.workers.names, step.workers.sizes))
    run = jax.jit(without_communication(step.trace(state, batch), sizes))
    rows = lambda x: x[: x.shape[0] // step.workers.count]
    blocks = [_block(*pair) for pair in zip(jax.tree.leaves(step.places), _leaves(state))]
    shares = [
        np.array(x.addressable_shards[0].data)
        if isinstance(x, jax.Array) and x.sharding == step.workers.sharding(Place.SPLIT)
        else np.array(rows(x))
        for x in jax.tree.leaves(batch)
    ]
    device = jax.local_devices()[0]
    arguments = [jax.device_put(x, device) for x in (*blocks, *shares)]
    arguments = [_key_like(x, like) for x, like in zip(arguments, jax.tree.leaves((state, batch)))]
    jax.block_until_ready(run(*arguments))  # compiles

    return lambda: _median_seconds(lambda: run(*arguments))


def _block(place: Place, x) -> np.ndarray:
    """A copy of one worker's part; XLA lays out empty arrays as it likes."""
    block = np.array(x.addressable_shards[0].data)
    return block[:1] if place is Place.PER_WORKER else block


def _leaves(state):
    unwrap = lambda x: jax.random.key_data(x) if _is_key(x) else x
    return [unwrap(x) for x in jax.tree.leaves(state)]


def _is_key(x) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_like(x, like):
    return jax.random.wrap_key_data(x) if _is_key(like) else x


def _fixed_work() -> Callable[[], float]:
    """A product of matrices, some milliseconds on a laptop."""
    device = jax.local_devices()[0]
    x = jax.device_put(np.ones((512, 512), np.float32), device)
    run = jax.jit(lambda x: x @ x)
    jax.block_until_ready(run(x))
    return lambda: _median_seconds(lambda: run(x))


def _median_seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
