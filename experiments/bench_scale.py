"""What a step costs as the work grows, and how well `plan` predicts it.

    python -m experiments.bench scale [--workdir=runs/bench_scale] [--hosts=2,4] [--only=leaves]
        [--rates=100mbit,10mbit] [--largest=100000000] [--limit=300]

One device: simulated workers from 8 to 1,024, parameters from 1e5 to 1e8, 1e6 and 1e8 of them in
10 to 10,000 leaves; a process each. Then real steps on throttled hosts (needs root) beside the
predicted ones, and the predicted ones to 4,096 workers. Rows that WORKDIR/rows.jsonl has are kept:
an interrupted run goes on; a case that failed or did not fit is tried again. Writes scale.md and
scale.png. `--only` takes some of workers, parameters, leaves, hosts.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

from experiments import cluster, command_line, netns
from experiments.bench_scale_cases import RAW, Case, Link, alone_cases, link_cases
from experiments.bench_scale_report import GROW, draw, report
from experiments.rows import append_row, read_rows

ALONE, HOSTS = tuple(f.name for f in dataclasses.fields(Case)), ("method", "hosts", "rate")
PARTS = (*GROW, "hosts")


def run_alone(cases: list[Case], path: Path, limit: float) -> dict[Case, str]:
    """Runs what is missing; returns why cases have no row."""
    reasons = {}
    for case in cases:
        if _key(case) in read_rows(path, ALONE):
            continue
        if (free := _free_bytes()) < case.bytes:
            reasons[case] = (
                f"skipped: may need {case.bytes / 1e9:.0f} GB, {free / 1e9:.0f} are free"
            )
        else:
            reasons[case] = _one(case, path, limit)
        if not reasons[case]:
            del reasons[case]
        print(*_key(case), reasons.get(case, "done"), flush=True)
    return reasons


def _one(case: Case, path: Path, limit: float) -> str:
    """Appends the row of a case; the reason if there is none."""
    command = [sys.executable, "-m", "experiments.bench_scale_worker"]
    try:
        ended = subprocess.run(
            [*command, json.dumps(dataclasses.asdict(case))],
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
        )
    except subprocess.TimeoutExpired:
        return f"not done within {limit:.0f} s"
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return f"failed: {last[:200]}"
    append_row(path, json.loads(ended.stdout.strip().splitlines()[-1]))
    return ""


def run_hosts(links: list[Link], path: Path, limit: float | None = None) -> str:
    """Runs what is missing, a set of processes a number of hosts and rate; the reason if not.

    Raises:
      RuntimeError: a job failed; what it had finished is kept.
    """
    done = read_rows(path, HOSTS)
    missing = [link for link in links if _key(link) not in done]
    for hosts, rate in dict.fromkeys((link.hosts, link.rate) for link in missing):
        todo = path.parent / "todo.json"
        mine = [link for link in missing if (link.hosts, link.rate) == (hosts, rate)]
        todo.write_text(json.dumps([dataclasses.asdict(link) for link in mine]))
        words = ("-m", "experiments.bench_scale_hosts", str(todo), str(path))
        try:
            outcome = cluster.launch(
                cluster.Job(words, hosts, None if rate == RAW else rate, timeout=limit)
            ).outcome
        except netns.NetworkError as error:
            return f"no throttled hosts: {error}"
        if outcome.exit_code:
            raise RuntimeError(f"bench scale: {outcome.reason}")
    return ""


def _key(case) -> tuple:
    return dataclasses.astuple(case)


def _free_bytes() -> int:
    """Memory that programs may still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo does not say what is available")


def define_flags() -> None:
    """The command line of this measurement."""
    flags.DEFINE_string("workdir", "runs/bench_scale", "Where rows, table and figure go.")
    flags.DEFINE_list("only", ",".join(PARTS), "Which parts.")
    command_line.define_counts("hosts", [2, 4], "Numbers of real hosts.", least=2)
    flags.DEFINE_list("rates", "raw,100mbit,10mbit", "What each host may send.")
    flags.DEFINE_integer("largest", 10**8, "Largest number of parameters.")
    flags.DEFINE_float("limit", 600.0, "Seconds after which a case is given up.")


def main(arguments: list[str]) -> None:
    """Measures what is missing, prints the tables, draws the figure."""
    values = flags.FLAGS
    if arguments:
        raise ValueError(f"bench scale takes no arguments, got {arguments}")
    if not values.only or not set(values.only) <= set(PARTS):
        raise ValueError(
            f"--only must be some of {', '.join(PARTS)}, got {','.join(values.only)!r}"
        )
    workdir = Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "rows.jsonl"
    cases = [case for case in alone_cases(values.largest) if case.grows in values.only]
    links = link_cases(values.hosts, values.rates) if "hosts" in values.only else []
    reasons = run_alone(cases, path, values.limit)
    why_not = run_hosts(links, path, values.limit)
    alone, between = read_rows(path, ALONE), read_rows(path, HOSTS)
    text = report(list(alone.values()), list(between.values()))
    missing = [f"- {' '.join(map(str, _key(case)))}: {why}" for case, why in reasons.items()]
    missing += [f"- hosts: {why_not}"] if why_not else []
    if missing:
        text += "\nNot measured:\n\n" + "\n".join(missing) + "\n"
    (workdir / "scale.md").write_text(text)
    draw(list(alone.values()), list(between.values()), workdir / "scale.png")
    print(text)
