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

import os
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments.bench_faults_cases import KINDS, draw, possible
from experiments.bench_faults_run import measure
from experiments.rows import append_row, read_rows


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
