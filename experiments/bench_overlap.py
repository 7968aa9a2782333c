"""Do transfers hide? Rounds of the overlapped rules beside their parts, on throttled hosts.

    python -m experiments.bench overlap [--workdir=runs/bench_overlap] [--hosts=2,4]

Real processes, each in a network namespace behind a token bucket (`experiments.cluster`; needs
root), with two CPU devices: one computes, one makes the transfers. The computation of a step is
made so long that the transfers of a round take 0.5 and 0.9 of the round's. Where hosts outnumber
this machine's cores, also with a computation that leaves the cores alone, as an accelerator's does.
Rows that WORKDIR/rows.jsonl has are kept. Writes overlap.md.
"""

import os
from pathlib import Path

from absl import flags

from experiments import cluster, command_line
from experiments.rows import read_rows

RATIOS = ("0.5", "0.9")
RULES = ("streaming_diloco", "eager_diloco", "co2")
KEY = ("work", "rule", "hosts", "rate", "ratio")
GOAL = 1.08


def run(hosts: list[int], rate: str, workdir: Path, timeout: float | None = None) -> list[dict]:
    """Measures what is missing and returns the rows.

    Raises:
      RuntimeError: a job failed; what it had finished is kept.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "rows.jsonl"
    for work, n, ratio in _settings(hosts):
        wanted = [(work, rule, n, rate, float(ratio)) for rule in RULES]
        missing = [key[1] for key in wanted if key not in read_rows(path, KEY)]
        if not missing:
            continue
        words = ("-m", "experiments.bench_overlap_worker", str(path), rate, ratio, work, *missing)
        job = cluster.Job(words, hosts=n, rate=rate, devices_per_host=2, timeout=timeout)
        outcome = cluster.launch(job).outcome
        if outcome.exit_code:
            raise RuntimeError(f"bench overlap: {outcome.reason}")
    rows = read_rows(path, KEY)
    return [rows[w, rule, n, rate, float(r)] for w, n, r in _settings(hosts) for rule in RULES]


def _settings(hosts: list[int]) -> list[tuple[str, int, str]]:
    """(where the computation takes place, hosts, ratio)."""
    crowded = [n for n in hosts if n > (os.cpu_count() or 1)]
    places = [("cores", n) for n in hosts] + [("elsewhere", n) for n in crowded]
    return [(work, n, ratio) for work, n in places for ratio in RATIOS]


def report(rows: list[dict]) -> str:
    """The results as markdown."""
    lines = [
        "# Transfers behind computation",
        "",
        "    python -m experiments.bench overlap",
        "",
        "Seconds of a round (24 steps, 1,000,000 float32 parameters) on the slowest host, medians",
        "of five measured in turn: its computation alone, its transfers alone, both with the",
        "background channel, and plain DiLoCo, which waits. The goal is at most",
        f"{GOAL} times the larger of the first two. `load`: processes that wanted the cores.",
        "`work`: on the `cores` that the transfers use, too, or `elsewhere`, the device's thread",
        "asleep as it is while an accelerator computes.",
        "",
        "| rule | hosts | work | rate | computation | transfer | in the background | / larger "
        "| DiLoCo | / sum | load |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        larger = max(row["compute"], row["transfer"])
        total = row["compute"] + row["transfer"]
        lines.append(
            f"| {row['rule']} | {row['hosts']} | {row['work']} | {row['rate']} "
            f"| {row['compute']:.3f} | {row['transfer']:.3f} | {row['together']:.3f} "
            f"| {row['together'] / larger:.2f} "
            f"| {row['diloco']:.3f} | {row['diloco'] / total:.2f} | {row['load']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """The command line of this measurement."""
    flags.DEFINE_string("workdir", "runs/bench_overlap", "Where rows and the table go.")
    command_line.define_counts("hosts", [2, 4], "Numbers of hosts.", least=2)
    flags.DEFINE_string("rate", "100mbit", "Link of the hosts.")
    flags.DEFINE_float("timeout", None, "Seconds after which a set of hosts is ended.")


def main(arguments: list[str]) -> None:
    """Measures what is missing and prints the table."""
    values = flags.FLAGS
    if arguments:
        raise ValueError(f"bench overlap takes no arguments, got {arguments}")
    workdir = Path(values.workdir)
    text = report(run(values.hosts, values.rate, workdir, values.timeout))
    (workdir / "overlap.md").write_text(text)
    print(text)
