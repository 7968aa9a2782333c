"""Do transfers hide? Rounds of the overlapped rules beside their parts, on throttled hosts.

    python -m experiments.bench overlap [--workdir=runs/bench_overlap] [--hosts=2,4]

Real processes, each in a network namespace behind a token bucket (`experiments.cluster`; needs
root), with two CPU devices: one computes, one makes the transfers. The computation of a step is
made so long that the transfers of a round take 0.5 and 0.9 of the round's. Rows that
WORKDIR/rows.jsonl has are kept. Writes overlap.md.
"""

from pathlib import Path

from absl import flags

from experiments import cluster
from experiments.bench_wire import read_rows

RATIOS = ("0.5", "0.9")
RULES = ("streaming_diloco", "eager_diloco", "co2")
KEY = ("rule", "hosts", "rate", "ratio")
GOAL = 1.08


def run(hosts: list[int], rate: str, workdir: Path, timeout: float | None = None) -> list[dict]:
    """Measures what is missing and returns the rows.

    Raises:
      RuntimeError: a job failed; what it had finished is kept.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "rows.jsonl"
    for n in hosts:
        for ratio in RATIOS:
            wanted = [(rule, n, rate, float(ratio)) for rule in RULES]
            missing = [key[0] for key in wanted if key not in read_rows(path, KEY)]
            if not missing:
                continue
            words = ("-m", "experiments.bench_overlap_worker", str(path), rate, ratio, *missing)
            job = cluster.Job(words, hosts=n, rate=rate, devices_per_host=2, timeout=timeout)
            outcome = cluster.launch(job).outcome
            if outcome.exit_code:
                raise RuntimeError(f"bench overlap: {outcome.reason}")
    rows = read_rows(path, KEY)
    keys = [(rule, n, rate, float(r)) for n in hosts for r in RATIOS for rule in RULES]
    return [rows[key] for key in keys]


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
        "",
        "| rule | hosts | rate | computation | transfer | in the background | / larger "
        "| DiLoCo | / sum | load |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        larger = max(row["compute"], row["transfer"])
        total = row["compute"] + row["transfer"]
        lines.append(
            f"| {row['rule']} | {row['hosts']} | {row['rate']} | {row['compute']:.3f} "
            f"| {row['transfer']:.3f} | {row['together']:.3f} | {row['together'] / larger:.2f} "
            f"| {row['diloco']:.3f} | {row['diloco'] / total:.2f} | {row['load']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """The command line of this measurement."""
    flags.DEFINE_string("workdir", "runs/bench_overlap", "Where rows and the table go.")
    flags.DEFINE_list("hosts", ["2", "4"], "Numbers of hosts.")
    flags.DEFINE_string("rate", "100mbit", "Link of the hosts.")
    flags.DEFINE_float("timeout", None, "Seconds after which a set of hosts is ended.")


def main(arguments: list[str]) -> None:
    """Measures what is missing and prints the table."""
    values = flags.FLAGS
    if arguments:
        raise ValueError(f"bench overlap takes no arguments, got {arguments}")
    workdir = Path(values.workdir)
    text = report(run([int(n) for n in values.hosts], values.rate, workdir, values.timeout))
    (workdir / "overlap.md").write_text(text)
    print(text)
