"""A training as a job of real processes for `bench_faults`: started, read line by line, ended."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

STEPS, CHECKPOINT_EVERY, ROWS = 100, 10, 20
ROOT = Path(__file__).resolve().parent.parent


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
