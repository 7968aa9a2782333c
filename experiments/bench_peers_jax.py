"""The JAX side of `experiments.bench peers`: jaxcomm's methods, and dense JAX without jaxcomm.

Each has the step, and the same step `alone` (its program without the collectives, codecs included)
and `local` (gradient and AdamW, without an exchange or a codec).
"""

from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.bench_peers_cases import ADAMW, AXIS, Method
from experiments.config import Config
from experiments.expressions import evaluate
from experiments.schedules import learning_rate
from experiments.tasks import Task
from jaxcomm.traffic.alone import without_communication
from jaxcomm.training.loop import put_batch
from jaxcomm.training.make import make_train_step
from jaxcomm.training.overlap import OverlappedStep
from jaxcomm.training.step import TrainStep, free

Arrays = dict[str, np.ndarray]


def export(params) -> Arrays:
    """A tree of parameters as a flat dict of arrays, such as `blocks.block_00.qkv.kernel`."""
    pairs = jax.tree.leaves_with_path(params)
    return {".".join(str(k.key) for k in path): np.asarray(x) for path, x in pairs}


def restore(arrays: Arrays, like):
    """The tree of parameters whose export is `arrays`."""
    names = export(like)
    if names.keys() != arrays.keys():
        raise ValueError(f"names differ: {', '.join(sorted(names.keys() ^ arrays.keys()))}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])


def make_step(method: Method, config: Config, task: Task, **where) -> TrainStep:
    """The train step of a method of jaxcomm, on all devices of the job or where it is said."""
    rate = learning_rate(config)
    scope = {
        "axis_name": AXIS,
        "learning_rate": lambda step: method.rate * rate(step // method.parts),
        "steps": config.steps * method.parts,
        "warmup_steps": config.learning_rate.warmup_steps,
    }
    tx = evaluate(method.tx, "tx", **scope)
    sync = evaluate(method.sync, "sync", **scope) if method.sync else None
    if "simulate" not in where:
        where["background"] = method.background
    return make_train_step(task.loss_fn, tx, axis_name=AXIS, sync=sync, **where)


class Jaxcomm:
    """A method of jaxcomm on this host."""

    def __init__(self, step: TrainStep, params):
        self._step = step
        self._state = step.init(params, jax.random.key(1))
        self._alone: Callable | None = None

    def step(self, tokens: np.ndarray) -> str:
        """One step; returns which conditional exchanges took place."""
        batch = put_batch(self._step, {"tokens": tokens})
        self._state, metrics = self._step(self._state, batch)
        jax.block_until_ready((self._state, metrics))
        return "".join(map(str, np.asarray(metrics["branches"])))

    def alone(self, tokens: np.ndarray) -> None:
        """The same step with its collectives removed, on this host's own device."""
        if self._alone is None:
            self._start_alone(put_batch(self._step, {"tokens": tokens}))
        assert self._alone is not None
        old, out = self._mine, self._alone(*self._mine, _put(tokens))
        free(old, out)
        self._mine = jax.block_until_ready(out)[: len(old)]

    def _start_alone(self, batch) -> None:
        self._mine = [x.addressable_data(0).copy() for x in jax.tree.leaves(self._state)]
        if isinstance(self._step, OverlappedStep):
            pieces = self._step.alone(self._state, batch)
            self._alone = lambda *leaves: pieces(list(leaves))
            return
        workers = self._step.workers
        traced = self._step.trace(self._state, batch)
        run = without_communication(traced, dict(zip(workers.names, workers.sizes)))
        donate = range(len(self._mine)) if self._step.donates_all else ()  # as the step does
        self._alone = jax.jit(run, donate_argnums=tuple(donate))

    def params(self) -> Arrays:
        """The mean of all hosts' parameters; all of them call it."""
        return export(jax.tree.map(_here, self._step.consensus(self._state)))


class PlainJax:
    """Dense AdamW by `jax.jit` alone: the batch is split over the devices, XLA does the rest."""

    def __init__(self, config: Config, task: Task, params):
        tx = optax.adamw(learning_rate(config), **ADAMW)

        def step(state, batch):
            params, opt_state = state
            grads = jax.grad(lambda p: task.loss_fn(p, batch, None)[0])(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
        same, self._split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        start = lambda p: (p, tx.init(p))
        self._state = jax.jit(start, out_shardings=same)(params)
        self._run = jax.jit(step, donate_argnums=0, out_shardings=same)
        self._mine, self._alone = None, jax.jit(step, donate_argnums=0)

    def step(self, tokens: np.ndarray) -> str:
        """One step."""
        batch = {"tokens": jax.make_array_from_process_local_data(self._split, tokens)}
        self._state = jax.block_until_ready(self._run(self._state, batch))
        return ""

    def alone(self, tokens: np.ndarray) -> None:
        """The same step of this host's batch, on its own device."""
        if self._mine is None:
            self._mine = jax.tree.map(lambda x: _here(x).copy(), self._state)
        self._mine = jax.block_until_ready(self._alone(self._mine, {"tokens": _put(tokens)}))

    def params(self) -> Arrays:
        """The parameters."""
        return export(jax.tree.map(_here, self._state[0]))


def _here(x):
    return x.addressable_data(0)


def _put(tokens: np.ndarray):
    return jax.device_put(tokens, jax.local_devices()[0])
