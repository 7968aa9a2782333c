"""What `bench_faults` draws, and how each fault is made to happen."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

from experiments import netns
from experiments.bench_faults_job import STEPS, Run

KINDS = ("kill", "stop", "preempt", "cut", "full", "continue")
METHODS = ("ef21", "one_bit_adam", "qsr", "diloco", "streaming_diloco")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "preempt": signal.SIGTERM}
SIGNALS["continue"] = signal.SIGKILL
DISK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: what happens to whom, and when."""

    number: int
    kind: str
    method: str
    processes: int
    rank: int
    step: int  # of the metrics line after which it happens
    delay: float  # seconds later

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.number:03d}-{self.kind}-{self.method}"


def draw(seed: int, number: int, kinds: tuple[str, ...]) -> Case:
    """The case of this number; kinds take turns, everything else is random."""
    rng = random.Random(f"{seed}/{number}")
    kind, method = kinds[number % len(kinds)], rng.choice(METHODS)
    processes = 3 if kind == "continue" else rng.choice((2, 2, 3))
    first = 1 if kind == "continue" else 0  # without process 0 there is only a restart
    rank = rng.randrange(first, processes)
    return Case(
        number, kind, method, processes, rank, rng.randrange(1, STEPS - 5), rng.random() * 0.1
    )


def possible(kinds: list[str]) -> tuple[str, ...]:
    """The kinds that this machine allows.

    Raises:
      ValueError: a kind that does not exist.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    root = os.geteuid() == 0
    allowed = {"full": root and bool(shutil.which("mount")), "cut": root}
    if "cut" in kinds and root:
        try:
            with netns.Network(1, "100mbit"):
                pass
        except netns.NetworkError:
            allowed["cut"] = False
    return tuple(kind for kind in kinds if allowed.get(kind, True))


def hit(case: Case, run: Run, folder: Path) -> None:
    """Makes the fault happen."""
    if case.kind == "full":
        fill(folder / "checkpoints" / "filler")
    elif case.kind == "cut":
        link(run.process.pid, case.rank, "down")
    else:
        os.kill(run.pid(case.rank), SIGNALS[case.kind])


def undo(case: Case, run: Run, folder: Path) -> None:
    """Before the next attempt: somebody plugged it in again, or made room."""
    if case.kind == "full":
        (folder / "checkpoints" / "filler").unlink(missing_ok=True)
    elif case.kind == "cut":
        link(run.process.pid, case.rank, "up")


def link(launcher: int, rank: int, state: str) -> None:
    """Sets a host's interface up or down."""
    words = f"ip -n jc{launcher}n{rank} link set eth0 {state}".split()
    if subprocess.run(words, check=False, capture_output=True).returncode:
        raise ProcessLookupError(f"no host of rank {rank}")


def fill(path: Path) -> None:
    """Writes until nothing is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


@contextlib.contextmanager
def disk(case: Case, folder: Path):
    """A small disk for the checkpoints, if the case needs one."""
    if case.kind != "full":
        yield
        return
    target = folder / "checkpoints"
    target.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(target)]
    subprocess.run(words, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True, capture_output=True)
