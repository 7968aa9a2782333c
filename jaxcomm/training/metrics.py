"""What a run writes about itself: metrics.jsonl, summary.json, TensorBoard events, a progress bar.

``WORKDIR/metrics.jsonl`` has one JSON object a line and a line a logged step; ``summary.json`` the
final figures; ``tensorboard/`` the same scalars as events. JSON has no NaN: non-finite numbers are
written as the strings "nan", "inf" and "-inf", so that ``float(value)`` reads every number.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from jaxcomm.training._storage import is_url


class WorkdirError(ValueError):
    """A directory that cannot be written; the message is one sentence, `errno` the system's."""

    errno: int | None = None


class MetricsLogger:
    """Writes and shows the metrics of a run.

    Args:
      workdir: directory of the run; made if it does not exist.
      total_steps: the step at which the run ends.
      is_main: False makes every method do nothing (all processes but the first).
      tensorboard: also write TensorBoard events.
      console: where to show progress; a bar on a terminal, plain lines otherwise. Default: stdout.

    Raises:
      WorkdirError: the directory cannot be made or written.

    Example:
      >>> with MetricsLogger(tempfile.mkdtemp(), total_steps=400, tensorboard=False) as logger:
      ...     logger.log(100, {"loss": 0.125, "sent_bytes": 1_200_000, "seconds": 12.3})
      step 100/400  loss 0.1250  sent 1.2 MB  12.3 s
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        is_main: bool = True,
        tensorboard: bool = True,
        console: Console | None = None,
    ):
        self._total, self._main, self._tensorboard = total_steps, is_main, tensorboard
        self._dir = prepare_workdir(workdir) if is_main else Path(workdir)
        self._path = self._dir / "metrics.jsonl"
        self._console = console or Console()
        self._events: Any = None
        self._bar: Progress | None = None
        self._purge: int | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first logged line
        if is_main and self._path.exists():
            self._rewrite(_complete_lines(self._path))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line, and shows it.

        Args:
          step: the step that has ended.
          values: JSON values, jax or NumPy scalars; ``loss``, ``sent_bytes`` (bytes), ``seconds``
            and ``validation_...`` are also shown.
        """
        if not self._main:
            return
        row = {"step": int(step), **jsonable(values)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard:
            self._write_events(row)
        self._show(row)

    def truncate(self, step: int) -> dict[str, Any] | None:
        """Drops every line after ``step``, when a run continues from there.

        Returns:
          The last line that stays, or None: its ``seconds`` is where the clock goes on.
        """
        self._purge = step + 1
        if not self._main or not self._path.exists():
            return None
        lines = _complete_lines(self._path)
        lines = [line for line in lines if json.loads(line)["step"] <= step]
        self._rewrite(lines)
        return json.loads(lines[-1]) if lines else None

    def summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json, in one piece, and prints its figures (not its sub-trees)."""
        if not self._main:
            return
        self._stop_bar()
        values = jsonable(values)
        _replace(self._dir / "summary.json", json.dumps(values, indent=2) + "\n")
        table = Table(title=str(self._dir), title_justify="left", show_header=False)
        for key, value in values.items():
            if not isinstance(value, dict | list):
                table.add_row(key, _figure(key, value))
        self._console.print(table)

    def close(self) -> None:
        """Ends the progress bar and the event file."""
        self._stop_bar()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _rewrite(self, lines: list[str]) -> None:
        _replace(self._path, "".join(f"{line}\n" for line in lines))

    def _write_events(self, row: dict[str, Any]) -> None:
        if self._events is None:
            from tensorboardX import SummaryWriter  # slow to import, not always wanted

            folder = str(self._dir / "tensorboard")
            self._events = SummaryWriter(folder, purge_step=self._purge, flush_secs=10)
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._events.add_scalar(key, value, row["step"])

    def _show(self, row: dict[str, Any]) -> None:
        step, now = row["step"], time.monotonic()
        self._first = self._first or (step, now)
        if not self._console.is_terminal:
            text = f"step {step}/{self._total}  {_shown(row)}"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        if self._bar is None:
            columns = (
                "step {task.completed:.0f}/{task.total:.0f}",
                BarColumn(),
                "{task.fields[text]}",
            )
            columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=self._total, text="")
            self._bar.start()
        first, then = self._first
        rate = f"  {(step - first) / (now - then):.1f} steps/s" if step > first else ""
        self._bar.update(self._task, completed=step, text=_shown(row) + rate)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Stopwatch:
    """Seconds since its first call, after ``before`` seconds of an earlier part of the run.

    Called after every step, it leaves out the first one, which is mostly compilation.
    """

    def __init__(self, before: float = 0.0):
        self._before = before
        self._start: float | None = None

    def __call__(self) -> float:
        now = time.perf_counter()
        self._start = now if self._start is None else self._start
        return self._before + now - self._start


def human_bytes(n: float) -> str:
    """Bytes in decimal units.

    Example:
      >>> human_bytes(512), human_bytes(1_234_567)
      ('512 B', '1.2 MB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(n) >= (999.5 if units[0] == "B" else 999.95) and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:.0f} B" if units[0] == "B" else f"{n:.1f} {units[0]}"


def device_arithmetic() -> dict[str, Any]:
    """What the figures of this process were computed with."""
    device = jax.devices()[0]
    config: Any = jax.config  # its flags are attributes that type checkers do not see
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "default_matmul_precision": config.jax_default_matmul_precision or "default",
        "x64": bool(config.jax_enable_x64),
    }


def prepare_workdir(workdir: str | os.PathLike[str]) -> Path:
    """Makes the directory of a run and tries to write in it.

    Raises:
      WorkdirError: it cannot be made or written, or is a URL.
    """
    if is_url(workdir):
        raise WorkdirError(f"workdir must be in a mounted file system, got {workdir}")
    path = Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        failure = WorkdirError(f"cannot write to workdir {path}: {error.strerror}")
        failure.errno = error.errno
        raise failure from error


def jsonable(value: Any) -> Any:
    """Python values of a tree of jax and NumPy ones; non-finite numbers as strings."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    array = np.asarray(value)
    if array.dtype.kind not in "biu":
        array = array.astype(np.float64)  # bfloat16 has no Python type of its own
    return jsonable(array.tolist())


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file, without one that a kill cut short."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [line for line in lines if line.endswith("}") and line.startswith("{")]


def _replace(path: Path, text: str) -> None:
    """Writes a file in one piece: there is the old one or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _shown(row: dict[str, Any]) -> str:
    """'loss 0.1234  sent 1.2 MB  12.3 s'."""
    parts = [f"loss {float(row['loss']):.4f}"] if "loss" in row else []
    parts += [f"sent {human_bytes(row['sent_bytes'])}"] if "sent_bytes" in row else []
    parts += [f"{row['seconds']:.1f} s"] if "seconds" in row else []
    also = [key for key in row if key.startswith("validation_")]
    return "  ".join(parts + [f"{key} {float(row[key]):.4f}" for key in also])


def _figure(key: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("bytes"):
            return f"{value:,} ({human_bytes(value)})"
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return str(value)
