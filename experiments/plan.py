"""Which method pays on which link: traffic, predicted step times, break-even bandwidths of configs.

    python -m experiments.plan --config=configs/digits_ef21.py [--configs=configs/digits_qsr.py,...]
        [--links=10mbit,1gbit@20us,probe.json] [--workers=2,4,8]
        [--latency=50us] [--overhead=1.055] [--compute_ms=20]

Nothing is trained and no second device is needed. Traffic is counted by tracing the step for each
number of workers; computation and codecs are timed on this machine, with the communication
removed, unless they are given. Each worker keeps its share of the config's batch. Nothing is
assumed to hide behind computation. `--workdir` also gets plan.json.
"""

import dataclasses
import json
import logging as std_logging
import math

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

import jaxcomm
from experiments import command_line
from experiments.alone import branch_shares, mean_seconds, time_alone, traffic_for
from experiments.compare import load_configs
from experiments.config import Config
from experiments.probe import parse_link
from experiments.tasks import Task, make_task
from jaxcomm.traffic.advice import WITHOUT
from jaxcomm.traffic.link import ETHERNET, parse_seconds
from jaxcomm.traffic.table import (
    advice_table,
    bandwidth_text,
    grid_table,
    prediction_text,
    seconds_text,
    traffic_table,
)
from jaxcomm.training.metrics import prepare_workdir

LINKS = "10mbit,100mbit,1gbit,10gbit,100gbit,400gbit"
WORKERS = "2,4,8,16,32,64,128,256,512,1024,2048,4096"
DENSE_TX = "optax.chain(average(axis_name), optax.adamw(learning_rate))"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config, ready to be predicted: traffic by number of workers, seconds on this machine."""

    name: str
    workers: int
    traffic: dict[int, jaxcomm.Traffic]
    dense: dict[int, jaxcomm.Traffic]  # of the same model without the method
    shares: dict[tuple[int, ...], float]
    compute_seconds: float
    codec: tuple[float, float]  # seconds, and seconds a worker

    def codec_seconds(self, workers: int) -> float:
        """What encoding and decoding add to a step; linear in the messages received."""
        return max(0.0, self.codec[0] + self.codec[1] * workers)

    def method(self, workers: int) -> jaxcomm.Method:
        """What `jaxcomm.advise` compares."""
        seconds = self.codec_seconds(workers)
        return jaxcomm.Method(self.traffic[workers], seconds, branches=self.shares)


def dense_config(config: Config) -> Config:
    """The config with float32 gradients averaged in every step, and AdamW."""
    config = config.copy_and_resolve_references()
    config.tx, config.sync = DENSE_TX, ""
    return config


def make_plan(
    name: str,
    config: Config,
    workers: list[int],
    *,
    compute_seconds: float | None = None,
    codec_seconds: float | None = None,
) -> Plan:
    """Counts and times a config.

    Args:
      name: its name.
      config: the config.
      workers: for how many workers.
      compute_seconds: a step without the method; timed here if None.
      codec_seconds: what the method adds, whatever the number of workers; timed here if None.

    Raises:
      ValueError: a config for as many workers as there are devices, or one that does not train.
    """
    if config.workers < 1:
        rule = "config.workers must be at least 1 for plan, which counts no devices"
        raise ValueError(f"{rule}, got {config.workers}")
    task = make_task(config)
    batch = next(task.train_iterator(max(config.batch_size, 1), config.seed))
    counts = sorted({*workers, config.workers})
    traffic, dense_traffic = (
        {n: traffic_for(c, task, batch, n) for n in counts} for c in (config, dense_config(config))
    )
    shares = branch_shares(config, task) if traffic[counts[0]].choices else {(): 1.0}
    dense = compute_seconds
    if dense is None or codec_seconds is None:  # codecs are timed beside the computation here
        dense = _seconds(dense_config(config), task, batch, config.workers)
    codec = (codec_seconds or 0.0, 0.0)
    if codec_seconds is None:
        codec = _codec(config, task, batch, shares, dense)
    compute_seconds = dense if compute_seconds is None else compute_seconds
    return Plan(name, config.workers, traffic, dense_traffic, shares, compute_seconds, codec)


def _seconds(config, task: Task, batch, workers: int, shares=None) -> float:
    times = time_alone(config, task, batch, workers)
    return mean_seconds(times, shares or {b: 1 / len(times) for b in times})


def _codec(config, task: Task, batch, shares, dense: float) -> tuple[float, float]:
    """Seconds that the method adds: fixed, and for each worker if everyone's message is decoded."""
    few, many = config.workers, 16 * config.workers
    here = _seconds(config, task, batch, few, shares) - dense
    gathers = traffic_for(config, task, batch, few).by("op").get("all-gather", 0)
    if not gathers:
        return max(here, 0.0), 0.0
    there = _seconds(config, task, batch, many, shares) - dense
    each = max(0.0, there - here) / (many - few)
    return max(here, 0.0) - each * few, each


def times_table(plan: Plan, links: list[jaxcomm.Link], workers: list[int]):
    """Step times with and without compression: a row a number of workers, a column a link."""
    rows = {}
    for n in workers:
        advices = [advise({plan.name: plan}, link, n) for link in links]
        pairs = [(a.predictions[plan.name], a.predictions[WITHOUT]) for a in advices]
        even = bandwidth_text(advices[0].break_even[plan.name])
        rows[str(n)] = [*(prediction_text(*pair) for pair in pairs), even]
    title = f"{plan.name}: a step with / without compression"
    return grid_table(title, "workers", [*map(str, links), "pays below"], rows)


def methods_table(plans: dict[str, Plan], links: list[jaxcomm.Link], workers: int):
    """Step times of all methods: a row each, a column a link; the best one's is marked."""
    advices = [advise(plans, link, workers) for link in links]
    rows = {}
    for name in advices[0].predictions:
        cells = [seconds_text(a.predictions[name].step_seconds) for a in advices]
        marked = [f"{cell} *" if a.best == name else cell for cell, a in zip(cells, advices)]
        even = "" if name == WITHOUT else bandwidth_text(advices[0].break_even[name])
        rows[name] = [*marked, even]
    title = f"a step of {workers} workers (* shortest)"
    return grid_table(title, "method", [*map(str, links), "pays below"], rows)


def advise(plans: dict[str, Plan], link: jaxcomm.Link, workers: int) -> jaxcomm.Advice:
    """`jaxcomm.advise` on plans; computation is the first one's."""
    first = next(iter(plans.values()))
    dense = {WITHOUT: first.dense[workers]}
    methods = {name: plan.method(workers) for name, plan in plans.items()}
    return jaxcomm.advise(dense | methods, link, compute_seconds=first.compute_seconds)


def as_json(plans: dict[str, Plan], links: list[jaxcomm.Link], workers: list[int]) -> list[dict]:
    """All predictions, one entry a method, link and number of workers."""
    entries = []
    for n in workers:
        for link in links:
            advice = advise(plans, link, n)
            for name, p in advice.predictions.items():
                even = advice.break_even.get(name, 0.0)
                entry = {"method": name, "workers": n, **dataclasses.asdict(link)}
                entry |= {key: getattr(p, key) for key in FIGURES}
                entry["break_even_bandwidth"] = even if math.isfinite(even) else "inf"
                entries.append(entry)
    return entries


FIGURES = (
    "bytes_per_step",
    "compute_seconds",
    "codec_seconds",
    "latency_seconds",
    "transfer_seconds",
    "step_seconds",
)


def show(plans: dict[str, Plan], links: list[jaxcomm.Link], workers: list[int], console: Console):
    """Prints everything."""
    for name, plan in plans.items():
        console.print(f"\n[bold]{name}[/bold]")
        console.print(traffic_table(plan.traffic[plan.workers]))
        each = plan.codec[1]
        console.print(
            f"computation {seconds_text(plan.compute_seconds)} a step, codec "
            f"{seconds_text(plan.codec_seconds(plan.workers))}"
            + (f", {seconds_text(each)} of it for each worker" if each else "")
        )
        if plan.traffic[plan.workers].choices:
            shares = ", ".join(f"{share:.1%} {b}" for b, share in plan.shares.items())
            console.print(f"steps by the branches they take: {shares}", highlight=False)
        console.print(times_table(plan, links, workers))
    count = next(iter(plans.values())).workers
    if len(plans) > 1:
        console.print(methods_table(plans, links, count))
    console.print(advice_table(advise(plans, links[0], count)))


def worker_counts(texts: list[str]) -> list[int]:
    """The numbers of `--workers`.

    Raises:
      ValueError: not whole numbers of at least 1.
    """
    if not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"--workers must be whole numbers of at least 1, got {','.join(texts)}")
    return [int(text) for text in texts]


def main(_: list[str]) -> None:
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    file = [] if FLAGS.config is None else [config_flags.get_config_filename(FLAGS["config"])]
    configs = load_configs([*file, *FLAGS.configs])
    if file:
        configs[next(iter(configs))] = FLAGS.config  # with what the command line changes
    if not configs:
        raise app.UsageError("give --config=FILE.py, or --configs=FILE.py,FILE.py")
    latency = parse_seconds(FLAGS.latency)
    wire = {"latency": latency, "overhead": FLAGS.overhead, "burst": FLAGS.burst}
    links = [parse_link(text, **wire) for text in FLAGS.links]
    if not links:
        raise ValueError("--links must be at least one link, got none")
    workers = worker_counts(FLAGS.workers)
    given = {
        "compute_seconds": None if FLAGS.compute_ms is None else FLAGS.compute_ms / 1e3,
        "codec_seconds": None if FLAGS.codec_ms is None else FLAGS.codec_ms / 1e3,
    }
    plans = {name: make_plan(name, config, workers, **given) for name, config in configs.items()}
    console = Console()
    show(plans, links, workers, console if console.is_terminal else Console(width=170))
    if FLAGS.workdir:
        text = json.dumps(as_json(plans, links, workers), indent=1)
        (prepare_workdir(FLAGS.workdir) / "plan.json").write_text(text)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_list("configs", [], "Further config files to compare.")
    flags.DEFINE_list(
        "links", LINKS, "Bandwidths as tc writes them, @ adds a latency; or probe.json."
    )
    flags.DEFINE_list("workers", WORKERS, "Numbers of workers.")
    flags.DEFINE_string("latency", "50us", "Latency of links that do not say theirs.")
    flags.DEFINE_float("overhead", ETHERNET, "Bytes on the wire for each byte of a message.")
    flags.DEFINE_float("burst", 0.0, "Bytes that a link passes at once after a silence.")
    flags.DEFINE_float("compute_ms", None, "Milliseconds of a step's computation; default: timed.")
    flags.DEFINE_float("codec_ms", None, "Milliseconds of the codec in a step; default: timed.")
    flags.DEFINE_string("workdir", None, "Where to write plan.json.")
    command_line.run(main)
