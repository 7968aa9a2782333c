"""One host's part of `experiments.bench scale`: the step times that `plan` should predict.

    python -m experiments.bench_scale_hosts TODO.json ROWS.jsonl

TODO.json is a list of links (method, hosts, rate); all are measured in turn by one set of
processes, round after round, so that what else the machine does hits all of them. Rank 0 appends
a line to ROWS.jsonl for each. Computation is this host's part of the same step with its
communication removed, run by all hosts at the same time, as they share the machine's cores.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxcomm
from experiments.bench_scale_cases import ROUND, Link, make_step, mlp, mlp_batch, mlp_loss
from experiments.rows import append_row
from jaxcomm.training.distributed import initialize
from jaxcomm.training.loop import put_batch
from jaxcomm.training.straggler_monitor import step_alone

WARM, ROUNDS = 4, 15  # rounds; memory that is kept grows in the first


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a method between hosts; medians of the slowest host."""

    method: str
    hosts: int
    rate: str
    parameters: int
    seconds: float  # a step
    compute_seconds: float  # the same step without communication, codec included
    sent_bytes: float  # a step, by one host
    load: float


class Running:
    """A method, ready to be timed."""

    def __init__(self, method: str):
        self.step = make_step(method, mlp_loss)
        self.state = self.step.init(mlp(), jax.random.key(0))
        self.steps = ROUND if method == "local" else 1
        share = lambda x: np.split(x, jax.process_count())[jax.process_index()]
        self.batch = put_batch(self.step, tuple(map(share, mlp_batch(jax.device_count()))))
        self.report = jaxcomm.traffic(self.step, self.state, self.batch)
        self.alone = step_alone(self.step, self.state, self.batch)
        self.round()

    def round(self) -> float:
        """Seconds a step of one step, or of one round of a local method."""
        multihost_utils.sync_global_devices("bench scale")
        start = time.perf_counter()
        for _ in range(self.steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - start) / self.steps

    def compute(self) -> float:
        """Seconds a step of this host alone, all hosts at once."""
        multihost_utils.sync_global_devices("bench scale")
        return self.alone()

    @property
    def sent_bytes(self) -> float:
        """By one host, a step."""
        rare = self.report.conditional_bytes / self.steps
        return self.report.every_step_bytes + rare


def main(todo: str, rows: str) -> None:
    jaxcomm.keep_memory()
    initialize()
    links = [Link(**link) for link in json.loads(Path(todo).read_text())]
    running = [Running(link.method) for link in links]
    load = os.getloadavg()[0]
    one_round = lambda: [(r.round(), r.compute()) for r in running]
    for _ in range(WARM):
        one_round()
    times = np.array([one_round() for _ in range(ROUNDS)])
    slowest = multihost_utils.process_allgather(times).max(0)  # (rounds, methods, 2)
    if jax.process_index():
        return
    for i, (link, r) in enumerate(zip(links, running)):
        seconds, compute = (statistics.median(slowest[:, i, k].tolist()) for k in (0, 1))
        row = Row(
            **dataclasses.asdict(link),
            parameters=r.report.elements,
            seconds=seconds,
            compute_seconds=compute,
            sent_bytes=r.sent_bytes,
            load=load,
        )
        append_row(rows, dataclasses.asdict(row))
        print(f"{link.method}: {seconds:.4f} s a step, {compute:.4f} s alone", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
