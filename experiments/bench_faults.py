"""Randomly timed faults in jobs of real processes, and whether each run ends as it should.

    python -m experiments.bench faults --count=100 --seed=0 [--workdir=DIR] [--kinds=kill,stop]

    kill       SIGKILL of one process           cut       a host's link goes down (needs root)
    stop       SIGSTOP: alive but stuck         full      no space left for checkpoints (root)
    preempt    SIGTERM of one process           continue  SIGKILL, and the others go on

Each run is a smoke training on digits with 2 or 3 processes that checkpoints every few steps, and
is hit once at a random step. After all but `continue` the supervisor starts the job again, and its
last state and every line of its metrics must be those of the uninterrupted run, bit for bit; under
`continue` the survivors must end with a lower loss. Nothing may take longer than the time-out, and
every checkpoint that is left must be sound. The draws follow from the seed. WORKDIR/rows.jsonl
keeps a row a run: started again, the command goes on where it stopped. Ends with a table, which is
in WORKDIR/faults.md as well.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from orbax.checkpoint import v1 as ocp

from experiments import netns
from experiments.rows import append_row, read_rows
from jaxcomm.training._checkpoint_files import MARKER, read_marker

KINDS = ("kill", "stop", "preempt", "cut", "full", "continue")
METHODS = ("ef21", "one_bit_adam", "qsr", "diloco", "streaming_diloco")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "preempt": signal.SIGTERM}
SIGNALS["continue"] = signal.SIGKILL
STEPS, CHECKPOINT_EVERY, ROWS = 100, 10, 20
DISK_BYTES = 64 << 20
ROOT = Path(__file__).resolve().parent.parent


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


def command(method: str, processes: int, workdir: Path, options: dict[str, Any]) -> list[str]:
    """The training, under `experiments.cluster`."""
    fields = {
        "workers": processes,
        "batch_size": ROWS * processes,
        "steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "log_every": 1,
        "on_failure": options.get("on_failure", "restart"),
        "stuck_seconds": options["stuck"],
        "standstill_seconds": 120,
    }
    job = [f"--hosts={processes}", f"--timeout={options['timeout']}", "--grace=5"]
    job += [
        f"--{name}={options[name]}" for name in ("restarts", "losses", "rate") if name in options
    ]
    return [
        *(sys.executable, "-m", "experiments.cluster", *job, "--"),
        *("-m", "experiments.train", f"--config=configs/digits_{method}.py:smoke"),
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


class TooLate(Exception):
    """The job had ended before the fault could matter."""


class Run:
    """A job that runs, whose lines are read as they come."""

    def __init__(self, words: list[str], log: Path, cache: Path):
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: list[tuple[float, str]] = []
        self._log, self._changed, self._over = log, threading.Condition(), False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("w") as log, self.process.stdout:
            for line in self.process.stdout:
                log.write(line)
                with self._changed:
                    self.lines.append((time.monotonic(), line.rstrip()))
                    self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_for(self, pattern: str, deadline: float, start: int = 0) -> tuple[int, float, Any]:
        """(index, time, match) of the first line from `start` on.

        Raises:
          TimeoutError: there was none by the deadline, or the job ended without one.
        """
        at = start
        with self._changed:
            while True:
                for when, line in self.lines[at:]:
                    if match := re.search(pattern, line):
                        return at, when, match
                    at += 1
                left = deadline - time.monotonic()
                if left <= 0 or self._over:
                    raise TimeoutError(f"no line with {pattern!r}")
                self._changed.wait(min(left, 1.0))

    def pid(self, rank: int) -> int:
        """The process of a rank: a child of the launcher."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(words[1]) == self.process.pid and (
                    f"JAXCOMM_PROCESS_ID={rank}\0" in (folder / "environ").read_text()
                ):
                    return int(folder.name)
        raise ProcessLookupError(f"no process of rank {rank}")

    def end(self) -> None:
        """Ends the job, whatever it does."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
            self.process.kill()
        self.process.wait()
        self._reader.join(10)


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


def measure(case: Case, workdir: Path, timeout: float, stuck: float) -> dict[str, Any]:
    """Runs a case; the row of the table, with what failed, if anything."""
    reference = uninterrupted(case.method, case.processes, workdir, timeout)
    folder = workdir / case.name
    row = {**dataclasses.asdict(case), "failure": None}
    while case.step:  # a busy machine may be late with the fault: then it comes earlier
        try:
            row |= attempt(case, folder, reference, timeout, stuck)
            break
        except TooLate as error:
            row["failure"] = str(error)
            case = dataclasses.replace(case, step=case.step // 2)
        except (TimeoutError, AssertionError) as error:
            row["failure"] = str(error)
            break
    if not row["failure"]:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def attempt(
    case: Case, folder: Path, reference: Path, timeout: float, stuck: float
) -> dict[str, Any]:
    """Runs a case once; what was measured.

    Raises:
      TooLate: the job ended before the fault.
      TimeoutError: it hung, or did not do what was expected next.
      AssertionError: it ended, but not as it should.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options: dict[str, Any] = {"timeout": timeout, "stuck": stuck, "restarts": 3}
    if case.kind == "continue":
        options |= {"on_failure": "continue", "losses": 1, "restarts": 0}
    if case.kind == "cut":
        options["rate"] = "1gbit"
    with disk(case, folder):
        words = command(case.method, case.processes, folder, options)
        run = Run(words, folder / "log", cache(reference))
        try:
            result = follow(case, run, folder, timeout)
            return {**result, **check(case, folder, reference), "step": case.step, "failure": None}
        except OSError as error:
            lines = [line for _, line in run.lines]
            ended = not any("cluster: " in line or "lost" in line for line in lines)
            if ended and any(f"step {STEPS}/" in line for line in lines):
                raise TooLate("the job ended before the fault") from None
            raise TimeoutError(str(error)) from error
        finally:
            run.end()


def follow(case: Case, run: Run, folder: Path, timeout: float) -> dict[str, Any]:
    """Waits for the moment, makes the fault happen, and times what becomes of it."""
    deadline = time.monotonic() + timeout + 30
    index, _, _ = run.wait_for(rf"\[0\] step {case.step}/", deadline)
    time.sleep(case.delay)
    at = [int(m[1]) for _, line in run.lines if (m := re.search(r"\[0\] step (\d+)/", line))][-1]
    begin = time.monotonic()
    hit(case, run, folder)
    if case.kind == "continue":
        index, when, match = run.wait_for(r"from step (\d+), (\d+) steps again", deadline, index)
        index, when, _ = run.wait_for(r"\[0\] .*going on after", deadline, index)
        result = {"lost_steps": int(match[2]), "attempts": 1}
    else:
        index, named, _ = run.wait_for(r"^cluster: .*attempt \d+ of", deadline, index)
        undo(case, run, folder)
        index, when, match = run.wait_for(r"\[0\] step (\d+)/", deadline, index)
        result = {"lost_steps": max(0, at - int(match[1]) + 1), "noticed_seconds": named - begin}
    left = deadline - time.monotonic()
    try:
        code = run.process.wait(max(left, 1))
    except subprocess.TimeoutExpired:
        raise TimeoutError("the job did not end") from None
    attempts = 1 + sum("cluster: " in line and "attempt" in line for _, line in run.lines)
    assert code == 0, f"the job ended with code {code}"
    return {**result, "recovery_seconds": when - begin, "attempts": attempts}


def check(case: Case, folder: Path, reference: Path) -> dict[str, Any]:
    """What an ended run must fulfil.

    Raises:
      AssertionError: it does not.
    """
    for path in (folder / "checkpoints").glob(f"*/{MARKER}"):
        _, problem = read_marker(path.parent)
        assert problem is None, f"corrupt checkpoint {path.parent.name}: {problem}"
    found, expected = metrics(folder), metrics(reference)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1)), "steps are missing"
    if case.kind == "continue":
        assert found[-1]["lost_workers"] == 1, "nobody was lost"
        losses = [[row["loss"] for row in part] for part in (found[:10], found[-10:])]
        before, after = map(statistics.mean, losses)
        assert after < before, f"the loss went from {before:.4f} to {after:.4f}"
        whole = statistics.mean(row["loss"] for row in expected[-10:])
        return {"loss": after, "whole_loss": whole}
    assert found == expected, "the metrics differ from those of the uninterrupted run"
    state, whole = last_state(folder), last_state(reference)
    assert state.keys() == whole.keys(), "the last states have other leaves"
    other = [name for name in whole if state[name].tobytes() != whole[name].tobytes()]
    assert not other, f"the last states differ in {', '.join(other)}"
    return {"leaves": len(whole)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run but for the seconds."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """Every leaf of the last checkpoint, as it is stored."""
    path = max(
        (p.parent for p in (folder / "checkpoints").glob(f"*/{MARKER}")),
        key=lambda p: [int(part) for part in p.name.split("-")],
    )
    meta, _ = read_marker(path)
    abstract = {name: _empty(text) for name, text in meta["layout"].items()}
    return ocp.load(str(path), {name: x for name, x in abstract.items() if x.size})


def _empty(text: str) -> np.ndarray:
    """An array like a leaf of a layout, 'float32[8,4]' or 'key<threefry2x32>[]'."""
    name, _, shape = text.rstrip("]").partition("[")
    sizes = [int(size) for size in shape.split(",") if size]
    return np.empty([*sizes, 2], np.uint32) if name.startswith("key<") else np.empty(sizes, name)


def cache(reference: Path) -> Path:
    """Where programs of a method, with so many processes, are kept."""
    return reference.absolute() / "compiled"


def uninterrupted(method: str, processes: int, workdir: Path, timeout: float) -> Path:
    """The directory of the run without a fault, which is made once."""
    folder = workdir / "whole" / f"{method}-{processes}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        words = command(method, processes, folder, {"timeout": timeout, "stuck": 120})
        run = Run(words, folder / "log", cache(folder))
        try:
            code = run.process.wait(timeout + 30)
        finally:
            run.end()
        if code:
            raise RuntimeError(f"the run without a fault ended with code {code}, see {folder}/log")
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a kind."""
    lines = [
        "| fault | runs | failures | noticed, s (median, max) | recovered, s (median, max) "
        "| steps lost (median, max) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        figures = [
            _spread([row[key] for row in mine if row.get(key) is not None], digits)
            for key, digits in (("noticed_seconds", 1), ("recovery_seconds", 1), ("lost_steps", 0))
        ]
        failed = sum(row["failure"] is not None for row in mine)
        if mine:
            lines.append(f"| {kind} | {len(mine)} | {failed} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f}, {max(values):.{digits}f}"


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


def faults(count: int, seed: int, workdir: Path, kinds: list[str], timeout: float, stuck: float):
    """Runs what is not in rows.jsonl yet; all rows."""
    chosen = possible(kinds)
    for kind in set(kinds) - set(chosen):
        print(f"faults: {kind} is left out: this machine does not allow it", file=sys.stderr)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "rows.jsonl"
    rows = list(read_rows(path, ("number",)).values())
    for number in set(range(count)) - {row["number"] for row in rows}:
        row = measure(draw(seed, number, chosen), workdir, timeout, stuck)
        rows.append(row)
        append_row(path, row)
        ends = row["failure"] or f"recovered in {row['recovery_seconds']:.1f} s"
        print(f"{number + 1}/{count} {row['kind']} {row['method']}: {ends}", flush=True)
        (workdir / "faults.md").write_text(table(rows))
    return rows


def define_flags() -> None:
    """The command line of this measurement."""
    flags.DEFINE_integer("count", 100, "How many faults.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    flags.DEFINE_string("workdir", "runs/faults", "Where results go.")
    flags.DEFINE_list("kinds", list(KINDS), "Which faults.")
    flags.DEFINE_float("timeout", 240.0, "Seconds after which a run counts as hung.")
    flags.DEFINE_float("stuck", 10.0, "config.stuck_seconds of the runs.")


def main(_: list[str]) -> int:
    """Runs the faults that the flags describe; 1 if one of them ended as it must not."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows = faults(
        values.count,
        values.seed,
        Path(values.workdir),
        values.kinds,
        values.timeout,
        values.stuck,
    )
    print(table(rows))
    return int(any(row["failure"] for row in rows))
