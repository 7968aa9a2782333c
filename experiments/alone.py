"""What a config's step costs without a wire: seconds of one worker alone, and how often it meets.

`time_alone` runs the step of one worker of n with its communication removed (see
`jaxcomm.traffic.alone`), so that it takes one device and no axis. `branch_shares` runs the
config's rules on a stand-in model of the same tree, for all its steps, and counts the branches
they take: the exact average of a schedule, 1-bit stages and fragments included. Where a rule does
not fit the stand-in's small leaves (more values a message than they have) it is the model itself.
"""

import collections
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from experiments.config import Config
from experiments.tasks import Task
from experiments.train import make_step
from jaxcomm.traffic.alone import without_communication
from jaxcomm.training.step import TrainStep
from jaxcomm.training.workers import Place

Branches = tuple[int, ...]
STAND_IN = 8  # longest side of a leaf of the stand-in model


def step_for(config: Config, loss_fn: Callable, workers: int) -> TrainStep:
    """The config's step for another number of workers; it can be traced without any device."""
    config = config.copy_and_resolve_references()
    config.mode, config.workers = "simulate", workers
    return make_step(config, loss_fn)


def batch_shapes(config: Config, batch, workers: int):
    """Shapes of the global batch of so many workers, each with the config's share."""
    rows = config.batch_size // config.workers * workers
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)


def traffic_for(config: Config, task: Task, batch, workers: int) -> jaxcomm.Traffic:
    """The traffic of the config's step with so many workers; `batch` has any number of rows."""
    step = step_for(config, task.loss_fn, workers)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = step.abstract_state(jax.eval_shape(task.init, key), key)
    return jaxcomm.traffic(step, state, batch_shapes(config, batch, workers))


def time_alone(
    config: Config, task: Task, batch, workers: int, steps: int = 12
) -> dict[Branches, float]:
    """Median seconds of one worker's step without communication, by the branches it took.

    Args:
      config: the config.
      task: its task.
      batch: examples, at least one worker's share.
      workers: how many there are; what is received from them is decoded.
      steps: how many are timed.
    """
    step = step_for(config, task.loss_fn, workers)
    params, key = task.init(jax.random.key(config.seed)), jax.random.key(config.seed + 1)
    share = config.batch_size // config.workers
    rows = jax.tree.leaves(jax.tree.map(lambda x: jnp.asarray(x[:share]), batch))
    shapes = step.abstract_state(params, key)
    sizes = dict(zip(step.workers.names, step.workers.sizes))
    init = step.workers.trace_map(step._init, (Place.REPLICATED,) * 2, step.places)
    init = jax.jit(without_communication(jax.make_jaxpr(init)(params, key), sizes))
    traced = step.trace(shapes, batch_shapes(config, batch, workers))
    run = jax.jit(without_communication(traced, sizes))
    state = init(*jax.tree.leaves((params, key)))
    times = collections.defaultdict(list)
    for i in range(steps + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(run(*state, *rows))
        if i:  # the first run compiles
            times[tuple(np.asarray(out[-1]).tolist())].append(time.perf_counter() - start)
        state = out[: len(state)]
    return {branches: statistics.median(seconds) for branches, seconds in times.items()}


def branch_shares(config: Config, task: Task) -> dict[Branches, float]:
    """Share of the config's steps by the branches they take; `{(): 1.0}` without conditionals."""
    try:
        return _counted(config, task, STAND_IN)
    except ValueError:
        return _counted(config, task, None)


def _counted(config: Config, task: Task, longest: int | None) -> dict[Branches, float]:
    """The shares on a model of the task's tree whose sides are at most so long."""
    tree = jax.eval_shape(task.init, jax.random.key(0))
    small = lambda x: jnp.ones([min(side, longest or side) for side in x.shape], x.dtype)
    loss_fn = lambda params, batch, key: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    step = step_for(config, loss_fn, config.workers)
    state = step.init(jax.tree.map(small, tree), jax.random.key(config.seed))
    rows = jnp.zeros((config.workers,))

    def body(state, _):
        state, metrics = step(state, rows)
        return state, metrics["branches"]

    shape = jax.eval_shape(body, state, None)[1].shape
    if shape == (0,):
        return {(): 1.0}
    _, taken = jax.jit(lambda s: jax.lax.scan(body, s, None, config.steps))(state)
    counts = collections.Counter(map(tuple, np.asarray(taken).tolist()))
    return {branches: count / config.steps for branches, count in counts.items()}


def mean_seconds(times: dict[Branches, float], shares: dict[Branches, float]) -> float:
    """The average step; branches that were never timed cost what the dearest timed one costs."""
    return sum(share * times.get(b, max(times.values())) for b, share in shares.items())
