"""Runs a job of several processes: forwards what they print, ends all when one fails. Linux.

Each process leads a session of its own, so that what it starts ends with it and a Ctrl-C in the
terminal reaches the launcher alone. A launcher that is killed takes its processes along.
"""

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MISTAKE = 2  # exit code of what the user got wrong: no other attempt would be better
UNSAVED = 74  # EX_IOERR: the system could not write or read; another attempt may go well
TIMED_OUT = 124  # as timeout(1)
LONGEST_WAIT = 1.0  # seconds
DRAIN_SECONDS = 2.0  # for the last lines, should a process that got away hold the pipe

# Run before the command: the kernel kills this process when the launcher's main thread ends.
GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the launcher is gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


@dataclass(frozen=True)
class Command:
    """What one process runs; `environment` is all of it."""

    arguments: Sequence[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    rank: int
    exit_code: int  # minus the number of the signal that killed it, as in subprocess
    seconds: float
    stopped: bool  # it was still running when the job was ended


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `exit_code` 0 and no `reason`, or what went wrong in one sentence."""

    exit_code: int
    reason: str | None
    ranks: tuple[Ended, ...]
    final: bool = False  # a signal to the launcher or a time-out ended it


class Events:
    """What happens to a job, in order: a rank (int) ended, or the launcher got a signal.

    While the `with` block runs, signals that would end the launcher only become events: no
    clean-up is ever cut short. Those that were ignored (nohup) stay so. Main thread only.
    """

    def __init__(self):
        self.put = (queue_ := queue.SimpleQueue()).put  # safe in a signal handler
        self._get = queue_.get

    def __enter__(self):
        old = {number: signal.getsignal(number) for number in HANDLED}
        self._old = {n: handler for n, handler in old.items() if handler != signal.SIG_IGN}
        for number in self._old:
            signal.signal(number, lambda number, _: self.put(signal.Signals(number)))
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def next(self, deadline: float | None) -> "int | signal.Signals | None":
        """The next event; None once the deadline (of `time.monotonic`) has passed."""
        while True:  # a signal just before the wait is handled after it: no wait is long
            left = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
            with contextlib.suppress(queue.Empty):
                return self._get(timeout=min(left, LONGEST_WAIT))
            if left <= LONGEST_WAIT:
                return None


def run(
    commands: Sequence[Command],
    events: Events,
    *,
    timeout: float | None = None,
    grace: float = 5.0,
    deadline: float | None = None,
    losses: int = 0,
) -> Outcome:
    """Runs one process a command until all have ended well, or one (or more than `losses`) has not.

    Args:
      commands: the i-th is that of rank i.
      events: entered by the caller, so that its own set-up and clean-up are covered as well.
      timeout: seconds after which the job is ended; None for no limit.
      grace: seconds between SIGTERM and SIGKILL for those that have to be ended.
      deadline: when the time is up (of `time.monotonic`); default: `timeout` from now.
      losses: how many processes may fail, other than rank 0, while the others go on; but a mistake
        of the user (code 2) ends all. If it is not 0, who still runs `grace` seconds after rank 0
        has ended well has failed as well.

    Returns:
      how the job ended; every process that it started has ended by then.
    """
    if deadline is None and timeout is not None:
        deadline = time.monotonic() + timeout
    ranks: list[_Process] = []
    code, reason, final = 1, "the launcher failed", False
    try:
        for rank, command in enumerate(commands):
            ranks.append(_Process(rank, command, events.put))
        code, reason, final = _watch(ranks, events, deadline, timeout, grace, losses)
    finally:
        stopped = {process.rank for process in ranks if process.exit_code is None}
        late = _stop(ranks, events, grace)
    if code and late and not final:
        code, reason, final = 128 + late, f"got {late.name}, after {reason}", True
    ended = (Ended(p.rank, p.exit_code or 0, p.seconds, p.rank in stopped) for p in ranks)
    return Outcome(code, reason, tuple(ended), final)


class _Process:
    """A running process, with a thread for each of its streams and one that waits for its end."""

    def __init__(self, rank: int, command: Command, report: Callable[[int], None]):
        self.rank = rank
        self.exit_code: int | None = None
        self.seconds = 0.0
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", GUARD, str(os.getpid()), *command.arguments],
            env=command.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._report = report
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._threads = [self._thread(_forward, f"[{rank}] ", *pair) for pair in streams]
        self._thread(self._wait)

    @staticmethod
    def _thread(target: Callable, *args) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread

    def _wait(self) -> None:
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.seconds = time.monotonic() - self._started
        self._report(self.rank)

    def terminate(self) -> None:
        """Asks the process itself to end; it may want its own children for that."""
        os.kill(self._process.pid, signal.SIGTERM)  # Popen's own way might reap it

    def kill(self) -> None:
        """Kills the process and what it started. Not reaped yet, its number is still its own."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Takes note of the end, which has been reported, and ends what the process started."""
        self.kill()
        self.exit_code = self._process.wait()
        return self.exit_code

    def drain(self, deadline: float) -> None:
        """Waits for the last lines."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_printing = threading.Lock()


def _forward(prefix: str, source, target: TextIO) -> None:
    """Whole lines, so that those of several ranks do not mix; drained even if nobody reads."""
    with source:
        for line in source:
            text = line.decode(errors="replace").rstrip("\r\n")
            # a closed pipe behind us must not block the ranks
            with _printing, contextlib.suppress(OSError, ValueError):
                target.write(f"{prefix}{text}\n")
                target.flush()


def _watch(
    ranks: list[_Process],
    events: Events,
    deadline: float | None,
    timeout: float | None,
    grace: float,
    losses: int,
) -> tuple[int, str | None, bool]:
    """Exit code, reason and `final`, once the job is over or has to be ended."""
    running = {process.rank for process in ranks}
    tolerant, over = losses > 0, False  # over: rank 0 has ended well, and so should the others
    while running:
        event = events.next(deadline)
        if event is None and over and len(running) > losses:
            return 1, f"rank 0 has ended well; ended {_names(running)}, still running", False
        if event is None and over:
            print(f"lost {_names(running)}, still running", file=sys.stderr, flush=True)
            return 0, None, False
        if event is None:
            left = _names(running)
            return TIMED_OUT, f"timed out after {timeout:g} s; still running: {left}", True
        if isinstance(event, signal.Signals):
            return 128 + event, f"got {event.name}; ended {_names(running)}", True
        running.remove(event)
        if code := ranks[event].reap():
            if event != 0 and losses > 0 and code != MISTAKE:
                losses -= 1
                print(f"lost rank {event}, which {describe(code)}", file=sys.stderr, flush=True)
                continue
            others = f"; ended {_names(running)}" if running else ""
            return _shell_code(code), f"rank {event} {describe(code)}{others}", False
        if event == 0 and tolerant:
            over, end = True, time.monotonic() + grace
            deadline = end if deadline is None else min(end, deadline)
    return 0, None, False


def _stop(ranks: list[_Process], events: Events, grace: float) -> signal.Signals | None:
    """Ends what still runs: politely, after the grace period or another signal for good.

    Returns:
      the first signal to the launcher meanwhile.
    """
    got = None
    alive = {process.rank: process for process in ranks if process.exit_code is None}
    for process in alive.values():
        process.terminate()
    deadline: float | None = time.monotonic() + grace
    while alive:
        event = events.next(deadline)
        if event is None or isinstance(event, signal.Signals):
            got = got or event
            for process in alive.values():
                process.kill()
            deadline = None  # nothing survives SIGKILL
        else:
            alive.pop(event).reap()
    for process in ranks:
        process.drain(time.monotonic() + DRAIN_SECONDS)
    return got


def describe(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have no name
        return f"was killed by signal {-code}"


def _shell_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _names(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
