"""jaxcomm beside PyTorch DDP and plain JAX: the same model, batches, optimizer, hosts and link.

    python -m experiments.bench peers [--quick] [--workdir=runs/bench_peers] [--only=PowerSGD]

Real processes, each in a network namespace behind a token bucket (needs root; without it, or with
`--rates=raw`, plain loopback). Cases that WORKDIR/rows.jsonl has are kept: an interrupted run goes
on. Writes peers.md, peers.json and peers.png. `--quick`: 4 hosts, the methods that matter most,
fewer steps. The PyTorch rows need `pip install jaxcomm[peers]`. Not here:
hivemind (pip finds no versions of its needs that fit each other) and torchft's DiLoCo (it wants a
lighthouse and a manager server beside the hosts).
"""

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from experiments import cluster, command_line, netns
from experiments.bench_peers_cases import HOSTS, METHODS, RATES, RAW, Case, cases
from experiments.bench_peers_plan import predictions
from experiments.bench_peers_report import draw, index, report
from experiments.rows import read_rows

KEY = tuple(field.name for field in dataclasses.fields(Case))
STEPS, QUICK_STEPS = 600, 400
SECONDS = 16.0  # of a timed case, about
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the hosts have no names that a server knows
}
XLA_THREADS = "--xla_cpu_multi_thread_eigen=false"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to measure.

    Args:
      steps: of a training.
      seconds: of a timed case, about.
      throttled: whether hosts have interfaces of their own.
      timeout: seconds after which a set of hosts is ended; None for no limit.
    """

    steps: int
    seconds: float
    throttled: bool
    timeout: float | None = None


def run(todo: list[Case], workdir: Path, setting: Setting) -> list[dict]:
    """Runs what is missing and returns the rows, in the order of the cases.

    Raises:
      RuntimeError: hosts failed; what they had finished is kept.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = _path(workdir, setting)
    for hosts in sorted({case.hosts for case in todo}):
        missing = [c for c in todo if c.hosts == hosts and _key(c) not in read_rows(path, KEY)]
        if not missing:
            continue
        plan = {"steps": setting.steps, "seconds": setting.seconds}
        content = {"plan": plan, "cases": [dataclasses.asdict(case) for case in missing]}
        (workdir / "todo.json").write_text(json.dumps(content))
        words = ("-m", "experiments.bench_peers_worker", str(workdir / "todo.json"), str(path))
        rate = "1gbit" if setting.throttled else None
        job = cluster.Job(words, hosts=hosts, rate=rate, timeout=setting.timeout)
        with _environment(ENVIRONMENT | {"XLA_FLAGS": _xla_flags()}):
            outcome = cluster.launch(job).outcome
        if outcome.exit_code:
            raise RuntimeError(f"bench peers: {outcome.reason}")
    done = read_rows(path, KEY)
    return [done[_key(case)] for case in todo]


def _path(workdir: Path, setting: Setting) -> Path:
    return workdir / f"rows_{setting.steps}.jsonl"


class _environment:
    """Environment variables for as long as the block runs."""

    def __init__(self, values: dict[str, str]):
        self._values = values

    def __enter__(self):
        self._old = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_):
        for name, value in self._old.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _xla_flags() -> str:
    return f"{os.environ.get('XLA_FLAGS', '')} {XLA_THREADS}".strip()


def _key(case: Case) -> tuple:
    return dataclasses.astuple(case)


def torch_missing(find: Callable = importlib.util.find_spec) -> str:
    """Why there are no rows of PyTorch, in one sentence; empty if there are."""
    if find("torch"):
        return ""
    return "PyTorch is not installed: its rows are left out (pip install 'jaxcomm[peers]')."


def possible(rates: tuple[str, ...]) -> tuple[str, ...]:
    """The links that this machine can have; says so if those are not all."""
    if any(rates):
        try:
            netns.check_machine()
        except netns.NetworkError as error:
            print(f"Only plain loopback is measured: {error}")
            return (RAW,)
    return rates


def define_flags() -> None:
    """The command line of this measurement."""
    flags.DEFINE_string("workdir", "runs/bench_peers", "Where rows, table and figure go.")
    flags.DEFINE_bool("quick", False, "Only the cells that matter most, and fewer steps.")
    command_line.define_counts("hosts", None, "Numbers of hosts; default 2,4 (quick: 4).", least=2)
    flags.DEFINE_list("rates", None, "Links, such as raw,1gbit,100mbit,10mbit.")
    flags.DEFINE_integer("steps", None, "Steps of a training.", lower_bound=10)
    flags.DEFINE_string("only", "", "Only methods whose name contains this.")
    flags.DEFINE_float("timeout", None, "Seconds after which a set of hosts is ended.")


def main(arguments: list[str]) -> None:
    """Measures what is missing, prints the table, draws the figure."""
    values = flags.FLAGS
    if arguments:
        raise ValueError(f"bench peers takes no arguments, got {arguments}")
    quick, without = values.quick, torch_missing()
    if without:
        print(without)
    hosts = tuple(values.hosts or ((4,) if quick else HOSTS))
    rates = possible(tuple(RAW if rate == "raw" else rate for rate in values.rates or RATES))
    steps = values.steps or (QUICK_STEPS if quick else STEPS)
    setting = Setting(steps, SECONDS, any(rates), values.timeout)
    todo = [c for c in cases(hosts, rates, quick, not without) if values.only in c.method]
    if not todo:
        raise ValueError(f"--only must be in the name of a method, got {values.only!r}")
    workdir = Path(values.workdir)
    failed = ""
    try:
        rows = run(todo, workdir, setting)
    except RuntimeError as error:  # there may be rows enough for a table
        failed, done = str(error), read_rows(_path(workdir, setting), KEY)
        rows = [done[key] for key in map(_key, todo) if key in done]
    if failed:
        print(failed, file=sys.stderr)
    if rows:
        chosen = f"--hosts={','.join(map(str, values.hosts))} " if values.hosts else ""
        _publish(rows, workdir, ("--quick " if quick else "") + chosen, steps)
    if failed:
        sys.exit(1)


def _publish(rows: list[dict], workdir: Path, options: str, steps: int) -> None:
    names = [m.name for m in METHODS]
    text = report(rows, names, options, predictions(index(rows), steps))
    (workdir / "peers.md").write_text(text)
    temporary = workdir / "peers.json.tmp"
    temporary.write_text(json.dumps(rows))
    os.replace(temporary, workdir / "peers.json")
    draw(rows, workdir / "peers.png")
    print(text)
