"""Names the process that is stuck or gone, instead of waiting for it for ever.

Every process writes its beats and its step under a key of its own in the coordination service, and
reads those of the others. Who has been silent for too long is named in one sentence, and the
process that noticed it ends with code 75 (sysexits' "temporary failure: try again"), also when its
main thread waits in a collective. A process whose threads are alive but whose steps stand still
(its data never come, say) is named after a longer time. A process that was itself suspended does
not accuse the others of the time it missed.

It takes the place of JAX's own limit of 100 s, which names nobody: give `initialize` WATCHED. That
process 0 has ended JAX itself notices, and aborts the others at once with a message of its own.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxcomm.training import distributed

TRY_AGAIN = 75  # EX_TEMPFAIL: what it means to supervisors, SLURM and Kubernetes is up to them
PREFIX = "jaxcomm/beats/"
FINISHED = -1
START_SECONDS = 300.0  # for a process that has not beaten yet
WATCHED = {"heartbeat_timeout_seconds": 10**7}  # for `initialize`: JAX itself ends nobody


class Beat(NamedTuple):
    """A sign of life."""

    count: int  # FINISHED once the process is done
    step: int


class Watch:
    """Who has been silent for how long; all times are arguments, in seconds.

    Args:
      rank: of this process.
      ranks: of the others.
      silence: after so long without a beat a process is stuck.
      standstill: after so long without a step of anyone those that are furthest behind are; 0
        never.
      now: the time at which everybody was alive.
    """

    def __init__(self, rank: int, ranks: set[int], silence: float, standstill: float, now: float):
        self._rank, self._silence, self._standstill = rank, silence, standstill
        self._heard = {r: (Beat(0, 0), now) for r in ranks}
        self._step, self._moved = 0, math.inf  # until the first step is due
        self._judged = self._answered = now

    def step(self, step: int, now: float) -> None:
        """This process has ended a step, or begins with the first (0)."""
        self._step, self._moved = step, now

    def hear(self, beats: Mapping[int, Beat], now: float) -> None:
        """The coordination service has answered."""
        self._answered = now
        for rank, (old, _) in self._heard.items():
            beat = beats.get(rank, old)
            if beat != old:
                self._heard[rank] = (beat, now)
                if beat.step != old.step:
                    self._moved = now

    def forget(self, rank: int) -> None:
        """A process that is known to be gone."""
        self._heard.pop(rank, None)

    def silent(self, silence: float | None = None) -> list[int]:
        """Who has not beaten for so long although the coordination service answered."""
        silence = self._silence if silence is None else silence
        limit = lambda beat: silence if beat.count else max(silence, START_SECONDS)
        return [
            rank
            for rank, (beat, heard) in sorted(self._heard.items())
            if beat.count != FINISHED and self._answered - heard > limit(beat)
        ]

    def verdict(self, now: float, silence: float | None = None) -> str | None:
        """What is wrong, in one sentence, if anything."""
        silence = self._silence if silence is None else silence
        missed, self._judged = now - self._judged, now
        if missed > self._silence / 2:  # this process was suspended itself
            self._heard = {rank: (beat, now) for rank, (beat, _) in self._heard.items()}
            self._moved, self._answered = max(self._moved, now), now
        running = {r: h for r, h in self._heard.items() if h[0].count != FINISHED}
        if not running:
            return None
        if now - self._answered > silence:
            last = f", last seen at step {running[0][0].step}" if 0 in running else ""
            return (
                "rank 0 is stuck or unreachable: its coordination service has not answered for "
                f"{now - self._answered:.1f} s{last}"
            )
        if silent := self.silent(silence):
            worst = max(now - running[r][1] for r in silent)
            are = "is" if len(silent) == 1 else "are"
            return f"{self._names(silent)} {are} stuck or gone: no sign of life for {worst:.1f} s"
        if self._standstill and now - self._moved > self._standstill:
            steps = {r: beat.step for r, (beat, _) in running.items()} | {self._rank: self._step}
            behind = sorted(r for r, step in steps.items() if step == min(steps.values()))
            return f"no step for {now - self._moved:.1f} s; furthest behind: {self._names(behind)}"
        return None

    def _names(self, ranks: list[int]) -> str:
        at = {r: self._heard[r][0].step if r in self._heard else self._step for r in ranks}
        each = ", ".join(f"{r} (last at step {at[r]})" for r in ranks)
        return f"rank{'s' if len(ranks) > 1 else ''} {each}"


class Watchdog:
    """The threads that beat, read and judge; does nothing in a process on its own.

    Args:
      silence: seconds without a sign of life after which a process is stuck; 0 for no watchdog.
      standstill: seconds without any step after which those furthest behind are; 0 for never.
      end: what to do with the sentence; default: print it and end the process with code 75.

    Raises:
      ValueError: a negative time.

    Example:
      >>> with Watchdog(silence=60.0) as watchdog:
      ...     watchdog.step(1)
    """

    def __init__(
        self,
        silence: float = 60.0,
        standstill: float = 0.0,
        end: Callable[[str], Any] | None = None,
    ):
        for name, value in (("silence", silence), ("standstill", standstill)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value:g} s")
        self._interval = min(max(silence / 10, 0.1), 5.0)
        self._end = end or give_up
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._watch: Watch | None = None
        self._step = 0
        self._leave: Callable[[], Any] | None = None
        self._patience = 0.0
        self._left: float | None = None  # when this process was made to leave the silent
        if silence and distributed.count() > 1:
            rank = distributed.rank()
            others = set(range(distributed.count())) - {rank}
            self._watch = Watch(rank, others, silence, standstill, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self._watch is not None:
            self._write(Beat(1, self._step))
        for run in (self._beat, self._judge) if self._watch else ():
            threading.Thread(target=run, name="jaxcomm_watchdog", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stop.set()
        if self._watch is not None and kind is None:
            with contextlib.suppress(Exception):  # the service may be gone
                self._write(Beat(FINISHED, self._step))

    def step(self, step: int) -> None:
        """Takes note of a step that has ended; 0: from now on a standstill is one."""
        self._step = step
        if self._watch is not None:
            with self._lock:
                self._watch.step(step, time.monotonic())

    @property
    def started(self) -> bool:
        """Whether this process has ended a step."""
        return self._step > 0

    def forget(self, rank: int) -> None:
        """A process that is known to be gone is not waited for."""
        if self._watch is not None:
            with self._lock:
                self._watch.forget(rank)

    def leave_silent(self, leave: Callable[[], Any], patience: float) -> None:
        """Calls `leave()` before the end, which comes only if it has not helped.

        Args:
          leave: what makes this process go on without the silent; they should be forgotten then.
          patience: seconds from that call to the end. A silent rank 0 is the end at once.
        """
        self._leave, self._patience = leave, patience

    def blame(self) -> str | None:
        """After a failed collective: who is to blame, as soon as somebody has missed some beats."""
        if self._watch is None:
            return None
        deadline = time.monotonic() + 8 * self._interval
        sentence = None
        while sentence is None and time.monotonic() < deadline:
            time.sleep(self._interval / 2)
            with self._lock:
                sentence = self._watch.verdict(time.monotonic(), 4 * self._interval)
        return sentence

    def _beat(self) -> None:
        assert self._watch is not None
        count = 1
        while not self._stop.wait(self._interval):
            count += 1
            try:
                self._write(Beat(count, self._step))
                beats = _parse(distributed.client().key_value_dir_get(PREFIX))
            except Exception:  # whatever the service says: it does not answer
                continue
            with self._lock:
                self._watch.hear(beats, time.monotonic())

    def _judge(self) -> None:
        assert self._watch is not None
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            with self._lock:
                sentence, silent = self._watch.verdict(now), self._watch.silent()
            if not self._waits(now, silent) and sentence and not self._stop.is_set():
                if distributed.rank() == 0:  # without its service the others could not say it
                    time.sleep(2 * self._interval)
                self._stop.set()
                self._end(sentence)

    def _waits(self, now: float, silent: list[int]) -> bool:
        """Whether this process may still go on without the silent; makes it leave them."""
        if self._leave is None or not silent or 0 in silent:
            self._left = None
            return False
        if self._left is None:
            self._left = now
            self._leave()
        return now - self._left < self._patience

    def _write(self, beat: Beat) -> None:
        key = f"{PREFIX}{distributed.rank()}"
        distributed.client().key_value_set(key, f"{beat.count} {beat.step}", allow_overwrite=True)


def give_up(sentence: str, code: int = TRY_AGAIN) -> NoReturn:
    """Prints the sentence and ends the process, wherever its main thread is."""
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(code)


def _parse(pairs: list[tuple[str, str]]) -> dict[int, Beat]:
    """Beats by rank.

    Example:
      >>> _parse([("jaxcomm/beats/1", "12 340")])
      {1: Beat(count=12, step=340)}
    """
    return {
        int(key.rpartition("/")[2]): Beat(*(int(word) for word in value.split()))
        for key, value in pairs
    }
