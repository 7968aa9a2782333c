"""Counted bytes beside the network's own counter, and time beside the ideal, on throttled hosts.

    python -m experiments.bench wire [--workdir=runs/bench_wire] [--hosts=2,4] [--only=sign]

Every compressor by every exchange on 2 and 4 hosts: real processes, each in a network namespace
behind a token bucket (`experiments.cluster`; needs root). Then the exchanges of 10 million elements
on 4 hosts at 100 Mbit/s and 1 Gbit/s, as one program and (`pipelined`) as jaxcomm.PipelinedMean.
Rows that WORKDIR/rows.jsonl has are kept: an interrupted run goes on. Writes wire.md and wire.json.
With `--rate=` (empty) plain loopback, whose counter everything else on the machine shares.
"""

import dataclasses
import json
import os
from pathlib import Path

from absl import flags

from experiments import cluster, command_line
from experiments.bench_wire_cases import Case, byte_cases, timed_cases
from experiments.bench_wire_report import report
from experiments.rows import read_rows

KEY = ("compressor", "exchange", "elements", "bucket_bytes", "hosts", "rate")
TIMED_HOSTS, TIMED_RATES = 4, ("100mbit", "1gbit")


@dataclasses.dataclass(frozen=True)
class Job:
    """The cases that one set of hosts runs."""

    hosts: int
    rate: str
    cases: list[Case]


def jobs(hosts: list[int], rate: str, only: str = "", timed: bool = True) -> list[Job]:
    """Everything there is to measure, or the cases whose compressor's name contains `only`."""
    todo = [Job(n, rate, byte_cases(n)) for n in hosts]
    if timed and rate:
        todo += [Job(TIMED_HOSTS, speed, timed_cases()) for speed in TIMED_RATES]
    return [
        dataclasses.replace(job, cases=[c for c in job.cases if only in c.compressor])
        for job in todo
    ]


def run(todo: list[Job], workdir: Path, timeout: float | None = None) -> list[dict]:
    """Runs what is missing and returns the rows, in the order of the jobs.

    Raises:
      RuntimeError: a job failed; what it had finished is kept.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "rows.jsonl"
    for job in todo:
        done = read_rows(path, KEY)
        missing = [c for c in job.cases if _key(c, job) not in done]
        if not missing:
            continue
        cases = workdir / "todo.json"
        cases.write_text(json.dumps([dataclasses.asdict(c) for c in missing]))
        words = ("-m", "experiments.bench_wire_worker", str(cases), str(path), job.rate)
        setting = cluster.Job(words, hosts=job.hosts, rate=job.rate or None, timeout=timeout)
        outcome = cluster.launch(setting).outcome
        if outcome.exit_code:
            raise RuntimeError(f"bench wire: {outcome.reason}")
    done = read_rows(path, KEY)
    return [done[_key(c, job)] for job in todo for c in job.cases]


def _key(case: Case, job: Job) -> tuple:
    values = dataclasses.asdict(case) | {"hosts": job.hosts, "rate": job.rate}
    return tuple(values[k] for k in KEY)


def define_flags() -> None:
    """The command line of this measurement."""
    flags.DEFINE_string("workdir", "runs/bench_wire", "Where rows and tables go.")
    command_line.define_counts("hosts", [2, 4], "Numbers of hosts of the byte rows.", least=2)
    flags.DEFINE_string("rate", "1gbit", "Link of the byte rows; empty for plain loopback.")
    flags.DEFINE_string("only", "", "Only compressors whose name contains this.")
    flags.DEFINE_bool("timed", True, "Also time the exchanges of 10 million elements.")
    flags.DEFINE_float("timeout", None, "Seconds after which a set of hosts is ended.")


def main(arguments: list[str]) -> None:
    """Measures what is missing and prints the tables."""
    values = flags.FLAGS
    if arguments:
        raise ValueError(f"bench wire takes no arguments, got {arguments}")
    workdir = Path(values.workdir)
    todo = jobs(values.hosts, values.rate, values.only, values.timed)
    if not any(job.cases for job in todo):
        raise ValueError(f"--only must be in the name of a compressor, got {values.only!r}")
    rows = run(todo, workdir, values.timeout)
    text = report(rows)
    (workdir / "wire.md").write_text(text)
    temporary = workdir / "wire.json.tmp"
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, workdir / "wire.json")
    print(text)
