"""One host's part of `experiments.bench overlap`: rounds with and without a background channel.

    python -m experiments.bench_overlap_worker ROWS.jsonl RATE RATIO WORK RULE [RULE ...]

The computation of a step is made so long that the transfers of a round take RATIO of the round's.
WORK is `cores` (products of matrices, on the cores that the transfers use, too) or `elsewhere` (the
device's thread sleeps, as a host does while its accelerator computes). Rank 0 appends a line to
ROWS.jsonl for each rule.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

import jaxcomm
from experiments.rows import append_row
from jaxcomm.sync import SyncRule
from jaxcomm.training.background import BackgroundStep
from jaxcomm.training.distributed import initialize
from jaxcomm.training.loop import put_batch

AXIS, ONE_THREAD = "workers", "--xla_cpu_multi_thread_eigen=false"
ELEMENTS = 1_000_000  # parameters; 4 MB in float32
ROUND, FRAGMENTS, DELAY = 24, 2, 11  # a fragment has 11 of the 12 steps before the next one leaves
ROUNDS, REPEATS, SIDE = 2, 5, 128


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of a round on the slowest host, medians; DiLoCo waits for its transfer."""

    rule: str
    hosts: int
    rate: str
    ratio: float  # of transfer to computation, as asked for
    work: str  # where the computation takes place: 'cores' or 'elsewhere'
    compute: float  # the local steps of a round alone
    transfer: float  # the transfers of a round alone
    together: float  # a round, transfers in the background
    diloco: float  # a round of plain DiLoCo
    load: float  # runnable processes on this machine, the minute's mean


def rules() -> dict[str, SyncRule]:
    """The overlapped rules, each with the same bytes a round."""
    return {
        "streaming_diloco": jaxcomm.streaming_diloco(
            AXIS, ROUND, FRAGMENTS, delay=DELAY, compressor=None
        ),
        "eager_diloco": jaxcomm.eager_diloco(AXIS, ROUND),
        "co2": jaxcomm.co2(AXIS, ROUND),
    }


def _products(repeats):
    return jax.lax.fori_loop(0, repeats, lambda _, m: m @ m, jnp.eye(SIDE) * 0.5).sum()


def _sleep(repeats):
    def wait(n):
        time.sleep(float(n) * 1e-5)
        return np.float32(0)

    return jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), repeats)


WORK = {"cores": _products, "elsewhere": _sleep}


def make_loss(work: str) -> Callable:
    """A quadratic, and `repeats` units of work that it does not depend on."""

    def loss_fn(params, batch, key):
        del key
        loss = optax.tree.sum(jax.tree.map(lambda x: 0.5 * jnp.mean(x**2), params))
        return loss + jax.lax.stop_gradient(WORK[work](batch["repeats"][0])) * 1e-9

    return loss_fn


def make(rule, background: bool, work: str):
    """The step, its state, on one of this host's two CPU devices."""
    devices = [jax.local_devices(process_index=i)[0] for i in range(jax.process_count())]
    mesh = Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
    tx = optax.sgd(0.1)
    step = jaxcomm.make_train_step(
        make_loss(work), tx, axis_name=AXIS, sync=rule, mesh=mesh, background=background
    )
    half = ELEMENTS // FRAGMENTS
    params = {f"block_{i}": np.ones(half, np.float32) for i in range(FRAGMENTS)}
    return step, step.init(params, jax.random.key(0))


class Bench:
    """The programs of one rule, and how long they take."""

    def __init__(self, rule, work: str):
        self.step, self.state = make(rule, True, work)
        self.plain, self.plain_state = make(jaxcomm.diloco(AXIS, ROUND), False, work)
        self.repeats = 1

    def batch(self):
        return put_batch(self.step, {"repeats": np.full((1,), self.repeats, np.int32)})

    def compute(self) -> float:
        """The local steps of a round."""
        state, batch, step = self.state._replace(sync_state=()), self.batch(), self.step
        assert isinstance(step, BackgroundStep)

        def run(state):
            for _ in range(ROUND):
                state, _ = step.alone(state, batch)
            return state

        fresh = jax.tree.map(lambda x: x.copy(), state)  # steps donate their state
        return _seconds(lambda: run(fresh))

    def transfer(self) -> float:
        """The transfers of a round."""
        step = self.step
        assert isinstance(step, BackgroundStep)
        return _seconds(lambda: step.transfers(self.state))

    def together(self) -> float:
        """Rounds with their transfers in the background."""
        return _seconds(lambda: self.train(ROUNDS * ROUND)) / ROUNDS

    def train(self, steps: int):
        """So many steps with a background."""
        batch = self.batch()
        for _ in range(steps):
            self.state, _ = self.step(self.state, batch)
        return self.state

    def diloco(self) -> float:
        """A round of plain DiLoCo."""
        batch = self.batch()

        def run():
            for _ in range(ROUND):
                self.plain_state, _ = self.plain(self.plain_state, batch)
            return self.plain_state

        return _seconds(run)

    def calibrate(self, ratio: float) -> None:
        """Makes the steps so long that transfer / computation is `ratio`."""
        for fn in (self.together, self.transfer, self.compute, self.diloco):
            fn()  # compiles
        self.train(ROUND - 1)  # what is timed begins just before a transfer does, and ends so
        goal = statistics.median(self.transfer() for _ in range(3)) / ratio
        self.repeats = 200
        for _ in range(3):
            self.repeats = max(1, round(self.repeats * goal / self.compute()))


def _seconds(call: Callable) -> float:
    """How long the call took on the slowest host; the hosts begin together."""
    multihost_utils.sync_global_devices("bench overlap")
    start = time.perf_counter()
    jax.block_until_ready(call())
    mine = np.float32(time.perf_counter() - start)
    return float(multihost_utils.process_allgather(mine).max())


def main(rows: str, rate: str, ratio: str, work: str, *names: str) -> None:
    jaxcomm.keep_memory()
    # a computation that takes every core leaves none to the transfers
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"
    initialize()
    for name in names:
        bench = Bench(rules()[name], work)
        bench.calibrate(float(ratio))
        kinds = ("compute", "transfer", "together", "diloco")
        taken = [[getattr(bench, kind)() for kind in kinds] for _ in range(REPEATS)]
        medians = dict(zip(kinds, map(statistics.median, zip(*taken))))
        load = os.getloadavg()[0]
        row = Row(name, jax.process_count(), rate, float(ratio), work, **medians, load=load)
        if jax.process_index() == 0:
            append_row(rows, dataclasses.asdict(row))
            print(row, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
