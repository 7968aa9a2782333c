"""One case of `experiments.bench scale` in a process of its own, so that its memory is its own.

    python -m experiments.bench_scale_worker CASE

CASE is a case as JSON; the last line of the output is the row as JSON.
"""

import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from experiments.bench_scale_cases import (
    Case,
    bare_step,
    layers_batch,
    layers_loss,
    make_step,
    tree,
    tree_loss,
)

REPEATS, BUDGET = 9, 3.0  # steps that are timed; seconds they may take, three at least
WARM = 6  # steps before them: memory that is kept grows for as long


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a case."""

    grows: str
    method: str
    workers: int
    parameters: int
    leaves: int
    examples: int
    seconds: float  # a step, all workers
    trace_seconds: float  # placement, tracing and lowering
    compile_seconds: float
    memory_bytes: int  # at the peak, beyond what imports took
    collectives: int  # a step
    load: float  # runnable processes on this machine, the minute's mean


def measure(case: Case) -> Row:
    """Compiles and runs the step."""
    load, before = os.getloadavg()[0], _peak()
    params = tree(case.parameters, case.leaves)
    loss_fn = layers_loss if case.examples else tree_loss
    batch = jnp.asarray(layers_batch(case) if case.examples else np.ones((case.workers, 1)))
    start = time.perf_counter()
    step = None
    if case.method == "none":
        state = jax.tree.map(lambda x: jnp.stack([x] * case.workers), params)
        batch = batch.reshape(case.workers, -1, batch.shape[-1])
        bare = functools.partial(bare_step, loss_fn)
        lowered = jax.jit(bare, donate_argnums=0).lower(state, batch)
    else:
        step = make_step(case.method, loss_fn, simulate=case.workers)
        state = step.init(params, jax.random.key(0))
        lowered = step.lower(state, batch)
    traced = time.perf_counter()
    run = lowered.compile()
    compiled = time.perf_counter()
    for _ in range(WARM):
        state = jax.block_until_ready(run(state, batch))[0]
    times: list[float] = []
    while len(times) < 3 or (len(times) < REPEATS and sum(times) < BUDGET):
        begin = time.perf_counter()
        state = jax.block_until_ready(run(state, batch))[0]
        times.append(time.perf_counter() - begin)
    count = 0 if step is None else len(jaxcomm.traffic(step, state, batch).every_step)
    return Row(
        **dataclasses.asdict(case),
        seconds=statistics.median(times),
        trace_seconds=traced - start,
        compile_seconds=compiled - traced,
        memory_bytes=_peak() - before,
        collectives=count,
        load=load,
    )


def _peak() -> int:
    """Bytes; getrusage's figure would begin with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    jaxcomm.keep_memory()
    print(json.dumps(dataclasses.asdict(measure(Case(**json.loads(sys.argv[1]))))))
