"""One host's part of `experiments.bench peers`: trains and times methods, reads its counter.

    python -m experiments.bench_peers_worker TODO.json ROWS.jsonl

TODO.json has the cases and the numbers of steps; rank 0 appends a line to ROWS.jsonl for each.
Both libraries run in this process, one thread each, and methods of both take turns. Hosts are
started behind a bucket; here each sets its own to the rate of the case, or removes it.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import netns
from experiments.bench_peers_cases import BY_NAME, RAW, Case, Method, config
from experiments.bench_peers_jax import Arrays, Jaxcomm, PlainJax, export, make_step, restore
from experiments.rows import append_row
from experiments.schedules import learning_rate
from experiments.tasks import make_task
from jaxcomm.training.distributed import initialize
from jaxcomm.training.memory import keep_memory
from jaxcomm.training.pacing import pace

FEWEST, MOST = 2, 30  # timed steps of a method that meets in every one
WARM = 10  # steps before: DDP rebuilds its buckets after the first, its PowerSGD starts at the
# third, and memory that is kept grows for as long
PACED = ("10mbit",)  # the queue of 50 ms overflows where several connections burst at once, so not
# with two hosts; at 100 Mbit/s the bucket's bursts are worth more
EVALUATIONS = 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """What TODO.json says, beside the cases."""

    steps: int  # of a training
    seconds: float  # of a timed case, about


class Bench:
    """What all cases of this process share."""

    def __init__(self, plan: Plan):
        self.plan, self.hosts, self.rank = plan, jax.process_count(), jax.process_index()
        self._connected = False
        self._tasks: dict[tuple[str, int], Any] = {}
        self._baselines: dict[str, PlainJax] = {}
        self._step: tuple[Any, Any] = (None, None)

    def task(self, size: str, seed: int = 0):
        """Config, task, initial parameters and learning rates of a size."""
        if (size, seed) not in self._tasks:
            cfg = config(size, self.hosts, self.plan.steps, seed)
            task = make_task(cfg)
            params = jax.device_get(task.init(jax.random.key(cfg.seed)))
            with jax.default_device(jax.local_devices()[0]):
                rates = np.asarray(jax.vmap(learning_rate(cfg))(np.arange(self.plan.steps)))
            self._tasks[size, seed] = cfg, task, params, rates
        return self._tasks[size, seed]

    def batches(self, method: Method, size: str, seed: int = 0) -> Iterator[np.ndarray]:
        """What this host takes of every global batch, a step of the method at a time."""
        cfg, task, _, _ = self.task(size, seed)
        for batch in task.train_iterator(cfg.batch_size, cfg.seed, self.rank, self.hosts):
            yield from np.split(batch["tokens"], method.parts)

    def peer(self, method: Method, size: str, start: int = 1, seed: int = 0):
        """The method, at its initial parameters; after `start` steps workers may go apart."""
        cfg, task, params, rates = self.task(size, seed)
        if method.library == "jaxcomm":
            if self._step[0] != (method, size):  # the training before the timing compiled it
                self._step = (method, size), make_step(method, cfg, task)
            return Jaxcomm(self._step[1], params)
        if method.library == "jax":
            return PlainJax(cfg, task, params)
        from experiments import bench_peers_torch

        if not self._connected:
            host, _, port = os.environ["JAXCOMM_COORDINATOR"].rpartition(":")
            interface = "eth0" if _counter_path() else "lo"
            address = f"tcp://{host}:{int(port) + 1}"
            bench_peers_torch.connect(self.rank, self.hosts, address, interface)
            self._connected = True
        rate = lambda step: float(rates[min(step, len(rates) - 1)])
        return bench_peers_torch.Peer(method.hook, cfg.task, export(params), rate, start)

    def local(self, method: Method, size: str, peer) -> Callable[[np.ndarray], None]:
        """A step of this library without an exchange or a codec."""
        if method.library == "torch":
            return peer.local
        if method.library == "jax":
            return peer.alone
        if size not in self._baselines:
            cfg, task, params, _ = self.task(size)
            self._baselines[size] = PlainJax(cfg, task, params)
        return self._baselines[size].alone

    def loss(self, case: Case) -> dict:
        """Validation loss along a training of each seed; the kind of every step, of the first's."""
        runs = [self._train(case, seed) for seed in range(BY_NAME[case.method].seeds)]
        return runs[0] | {"curves": [run["curve"] for run in runs]}

    def _train(self, case: Case, seed: int) -> dict:
        method, start = BY_NAME[case.method], max(1, self.plan.steps // 10)
        peer = self.peer(method, case.size, start, seed)
        batches = self.batches(method, case.size, seed)
        every = max(1, self.plan.steps // EVALUATIONS)
        kinds, curve, spent = [], [(0, self._evaluate(case.size, peer.params()))], 0.0
        for done in range(1, self.plan.steps + 1):
            for tokens in itertools.islice(batches, method.parts):
                before = time.perf_counter()
                kinds.append(peer.step(tokens))
                spent += time.perf_counter() - before
            if done % every == 0 or done == self.plan.steps:
                curve.append((done, self._evaluate(case.size, peer.params())))
        return {"kinds": kinds, "curve": curve, "seconds": spent}

    def _evaluate(self, size: str, arrays: Arrays) -> float:
        """By the same program for all; the other hosts' cores are better used."""
        if self.rank:
            return 0.0
        _, task, params, _ = self.task(size)
        with jax.default_device(jax.local_devices()[0]):
            return task.evaluate(restore(arrays, params))["validation_loss"]

    def times(self, cases: list[Case]) -> Iterator[dict]:
        """One method on one link after the other; compiled and warmed up once, on the fastest."""
        method, size = BY_NAME[cases[0].method], cases[0].size
        peer, batches = self.peer(method, size), self.batches(method, size)
        local = self.local(method, size, peer)
        together = method.library == "torch" and method.rounds  # no hook: steps are local's
        alone = local if together else peer.alone
        for _ in range(WARM):
            tokens = next(batches)
            for call in (alone, peer.step, local):  # alone begins with the state before the step
                _seconds(call, tokens)  # together: gloo waits 30 s for who compiles longer
        for case in cases:
            _meet()
            set_rate(case.rate)
            paced = method.library == "jaxcomm" and self.hosts > 2 and case.rate in PACED
            pace(case.rate if paced else None)
            yield self._time(method.rounds, batches, peer.step, alone, local)

    def _time(self, rounds: int, batches, step, alone, local) -> dict:
        quiet, load = _bytes_of(_meet, 4) / 2, os.getloadavg()[0]
        kinds, sent, times, planned = [], [], [], rounds
        while len(times) < (planned or FEWEST):
            tokens = next(batches)
            before = _counter()
            seconds, kind = _seconds(step, tokens)
            _meet()
            sent.append(_counter() - before - quiet)
            kinds.append(kind)
            times.append([seconds, *(_seconds(f, tokens)[0] for f in (alone, local))])
            if not planned:  # all hosts must agree
                slowest = _gather([seconds])[:, 0].max()
                planned = int(np.clip(self.plan.seconds / slowest, FEWEST, MOST))
        everyone = _gather(times)  # (hosts, steps, 3)
        slowest = everyone.max(0)
        share = 1 if _counter_path() else self.hosts  # all hosts have one loopback
        return {
            "kinds": kinds,
            "steps": slowest[:, 0].tolist(),
            "step": statistics.median(slowest[:, 0].tolist()),
            "alones": slowest[:, 1].tolist(),
            "alone": statistics.median(slowest[:, 1].tolist()),
            "local": statistics.median(slowest[:, 2].tolist()),
            "bytes": float(_gather([sent]).mean((0, 1)).mean() / share),
            "load": load,
        }


def _gather(values) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.float64)))


def _meet() -> None:
    """All hosts wait for each other; some hundred bytes."""
    multihost_utils.sync_global_devices("bench peers")


def _seconds(call: Callable, tokens) -> tuple[float, Any]:
    _meet()
    start = time.perf_counter()
    result = call(tokens)
    return time.perf_counter() - start, result


def _counter_path() -> str | None:
    return os.environ.get("JAXCOMM_COUNTER")


def _counter() -> int:
    return int(Path(_counter_path() or netns.LOOPBACK).read_text())


def _bytes_of(call: Callable[[], None], repeats: int) -> float:
    """Bytes that twice so many calls send, a pair."""
    before = _counter()
    for _ in range(2 * repeats):
        call()
    return 2 * (_counter() - before) / repeats


def set_rate(rate: str) -> None:
    """Throttles what this host sends from now on, as `netns.Network` does; RAW: not at all."""
    if not _counter_path():
        return
    device = ["dev", "eth0", "root"]
    subprocess.run(["tc", "qdisc", "del", *device], capture_output=True)  # there may be none
    if rate == RAW:
        return
    bucket = netns.bucket(netns.parse_rate(rate))
    subprocess.run(["tc", "qdisc", "add", *device, *bucket.split()], check=True)


def main(todo: str, rows: str) -> None:
    keep_memory()  # for both libraries
    initialize()
    content = json.loads(Path(todo).read_text())
    jax.config.update("jax_compilation_cache_dir", str(Path(rows).absolute().parent / "compiled"))
    bench = Bench(Plan(**content["plan"]))
    cases = [Case(**case) for case in content["cases"]]
    # neighbours that differ in their link only share a program
    groups = itertools.groupby(cases, lambda c: (c.kind, c.size, c.method))
    for (kind, _, _), group in groups:
        same = list(group)
        set_rate(RAW)
        pace(None)
        results = (bench.loss(c) for c in same) if kind == "loss" else bench.times(same)
        for case, result in zip(same, results):
            if jax.process_index() == 0:
                row = dataclasses.asdict(case) | result | {"about": _about()}
                append_row(rows, row)
                print(_line(case, result), flush=True)


def _about() -> dict[str, str]:
    """What was measured with."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    names = ("jax", "jaxlib", "torch")
    python = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    return python | {name: found[name] for name in names if name in found}


def _line(case: Case, result: dict) -> str:
    link = case.rate or "raw"
    if case.kind == "loss":
        mean = result["seconds"] / len(result["kinds"])
        return f"{case.method}: loss {result['curve'][-1][1]:.3f}, {mean:.4f} s a step, {link}"
    times = " ".join(f"{k} {result[k]:.4f}" for k in ("step", "alone", "local"))
    return f"{case.method}, {case.size}, {link}: {times} s, {result['bytes']:,.0f} bytes"


if __name__ == "__main__":
    main(*sys.argv[1:])
