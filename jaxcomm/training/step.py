"""The training step: one per-worker function, placed, mapped and compiled.

Each worker takes the gradient of its own share of the batch with respect to a varying view of the
parameters (under shard_map the gradient of replicated ones would already be summed over the axis),
passes it through the Optax chain, which communicates where the user said so, and applies the
result. With a sync rule the workers train apart and the rule decides when they meet.

A non-finite gradient or loss on any worker makes all workers skip that update: no memory is
touched, `skipped` counts it. With a sync rule the workers apart have nothing to agree on between
meetings: who saw it skips its own update, together with those that the optimizer exchanges with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.core import Tracer

from jaxcomm.collectives import all_sum, axis
from jaxcomm.collectives.conditional import APART, Choices, record_choices
from jaxcomm.collectives.primitives import sum_rows
from jaxcomm.sync._rule import SyncRule, all_finite
from jaxcomm.traffic.count import count
from jaxcomm.traffic.ledger import METRICS, UNMETERED
from jaxcomm.training import _storage
from jaxcomm.training._loss import differentiate
from jaxcomm.training.placement import OWN_CONDITIONAL, Layout, check_same, infer_places
from jaxcomm.training.workers import Place, Workers


class TrainState(NamedTuple):
    """Everything a run is; per-worker leaves have a leading worker axis."""

    step: jax.Array  # shape=(), dtype=jnp.int32: local steps done
    params: optax.Params
    opt_state: optax.OptState
    sync_state: Any  # of the sync rule; () without one
    key: jax.Array  # shape=(), PRNG key of the run
    skipped: jax.Array  # dtype=jnp.int32: updates skipped because of a non-finite gradient
    layout: Layout | None = None  # no arrays: what lives where, see resize_workers


class TrainStep:
    """`step(state, batch) -> (state, metrics)`, with `init`, `consensus`; see make_train_step."""

    def __init__(
        self,
        loss_fn: Callable,
        tx: optax.GradientTransformation,
        workers: Workers,
        sync: SyncRule | None,
        donate: bool,
    ):
        self.workers = workers
        self.layout = Layout(self._init, workers)
        self.choice_names: tuple[str, ...] = ()  # of `metrics['branches']`, once traced
        self._loss_fn, self._tx = loss_fn, optax.with_extra_args_support(tx)
        self._sync, self._donate = sync, donate
        self._update_axes: tuple[str, ...] | None = None  # see _locate; None before they are known
        self._run: Callable | None = None
        self._mean: Callable | None = None

    @property
    def places(self) -> Any:
        """A TrainState of Place, once it is known."""
        return self.layout.places

    # One worker's view.

    def _init(self, params, key) -> TrainState:
        sync_state = self._sync.init(params) if self._sync else ()
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, params, self._tx.init(params), sync_state, key, zero, self.layout)
        return jax.tree.map(_strong, state)

    def _step(self, state: TrainState, batch):
        """One step of one worker; also returns its metrics, and the branches that were taken."""
        key = jax.random.fold_in(state.key, state.step)
        key = jax.random.fold_in(key, axis.index(self.workers.axis_name))
        view = axis.varying(state.params, self.workers.axis_name)
        (loss, metrics), grads, obj_fn = differentiate(
            self._loss_fn, view, batch, key, self.workers.axis_name
        )
        metrics = {**metrics, "loss": loss.astype(jnp.float32)}
        choices = Choices()
        with record_choices(choices):
            state, metrics = self._apply(state, grads, metrics, obj_fn)
        self.choice_names = tuple(choices.names)
        branches = jnp.stack(choices.taken) if choices.taken else jnp.zeros((0,), jnp.int32)
        return state, metrics, branches

    def _apply(self, state: TrainState, grads, metrics, obj_fn):
        finite = all_finite((metrics["loss"], grads))
        sync, sync_state = self._sync, state.sync_state
        if sync is None:
            finite, metrics = self._agree(finite, metrics)
        elif axes := self._update_axes:  # what one of them sends reaches all of them
            finite = axis.varying(all_sum(~finite, axes, METRICS) == 0, axes)
        if sync is not None and sync.adjust is not None:
            grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads)
            grads, sync_state = sync.adjust(grads, state.params, sync_state, state.step, obj_fn)
        params, opt_state = self._update(finite, state, grads, metrics["loss"])
        step = state.step + 1
        if sync is not None:
            before = sync_state
            params, sync_state = sync.apply(params, sync_state, step)
            if sync.moments is not None:
                initial_fn = lambda: self._tx.init(params)
                opt_state = sync.moments(opt_state, initial_fn, before, step)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        new = TrainState(step, params, opt_state, sync_state, state.key, skipped, self.layout)
        return new, metrics

    def _update(self, finite, state: TrainState, grads, loss):
        """Parameters and optimizer state after its step, or as they were."""

        def advance(params, opt_state, grads, loss):
            try:
                updates, opt_state = self._tx.update(grads, opt_state, params, value=loss)
            except ValueError as error:
                if self._sync is None or APART not in str(error):
                    raise
                raise ValueError(_counts_apart(opt_state)) from error
            return optax.apply_updates(params, updates), opt_state

        def choose(*args):
            params, opt_state = advance(*args)
            check_same(state, state._replace(params=params, opt_state=opt_state))
            keep = lambda new, old: jnp.where(finite, new, old)
            return jax.tree.map(keep, (params, opt_state), args[:2])

        args = state.params, state.opt_state, grads, loss
        if not self._in_place:
            return choose(*args)
        types = jax.eval_shape(choose, *args)
        typed = lambda fn: lambda *args: axis.match_varying(fn(*args), types)
        return jax.lax.cond(finite, typed(advance), typed(lambda *args: args[:2]), *args)

    def _agree(self, finite, metrics):
        """One small sum: are everyone's gradients finite, and the means of the metrics."""
        leaves, treedef = jax.tree.flatten(metrics)
        flat = [jnp.where(finite, 0.0, 1.0).reshape(1)]
        flat += [x.astype(jnp.float32).reshape(-1) for x in leaves]
        total = all_sum(jnp.concatenate(flat), self.workers.axis_name, METRICS)
        means = jnp.split(total[1:] / self.workers.count, np.cumsum([x.size for x in leaves])[:-1])
        means = [mean.reshape(x.shape) for mean, x in zip(means, leaves)]
        return total[0] == 0, jax.tree.unflatten(treedef, means)

    # All workers.

    def abstract_state(self, params, key) -> TrainState:
        """Shapes and dtypes of the global state, and (in `self.places`) where each leaf lives."""
        params, key = jax.tree.map(_abstract, (params, _typed(key)))

        def one_step(state):
            zeros = jax.tree.map(jnp.zeros_like, (state.params, {"loss": jnp.float32(0)}))
            grads, metrics = axis.varying(zeros, self.workers.axis_name)
            # any loss will do: only types matter
            return self._apply(state, grads, metrics, optax.tree.sum)[0]

        places, state = infer_places(self._init, one_step, self.workers, params, key)
        if self._sync is None and self.workers.count > 1:
            self._check_meeting(one_step, places, state)
        self.layout.types = places
        return state

    def _check_meeting(self, one_step, places, state) -> None:
        """Replicas that differ between workers must at least communicate now and then."""
        apart = [
            jax.tree_util.keystr(path)
            for path, place in jax.tree.leaves_with_path(places.params)
            if place is not Place.REPLICATED
        ]
        if not apart:
            return
        collectives = self._collectives(one_step, places, places, state)
        _check_conditionals(collectives)
        if all(c.part == METRICS for c in collectives):
            raise ValueError(
                "tx does not communicate, so that the replicas would drift apart: put "
                f"jaxcomm.average({self.workers.axis_name!r}) first in its chain, or pass sync="
            )
        if len(apart) < len(jax.tree.leaves(places.params)):
            logging.warning(
                "only these parameters differ between workers: %s; what should stay as it is, "
                "jaxcomm.trainable leaves out",
                ", ".join(apart),
            )

    def init(self, params, key) -> TrainState:
        """The state before the first step, placed on the workers.

        Args:
          params: one pytree of floating-point arrays, which all workers start from.
          key: PRNG key of the run (typed, or raw uint32).

        Raises:
          ValueError: the state would change shape or dtype in a step.
        """
        self.abstract_state(params, key)
        init = self.workers.jit(self._init, (Place.REPLICATED,) * 2, self.places)
        state = init(params, _typed(key))
        if self.workers.mode != "simulate":
            return state
        # vmap may hand the caller's own arrays through, and steps donate their state
        return jax.tree.map(lambda x: x.copy(), state)

    def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
        """One step of all workers.

        Args:
          state: from `init`, an earlier step or a checkpoint; donated unless donate=False.
          batch: pytree whose leaves carry the global batch in axis 0; worker i of n gets the
            i-th contiguous n-th.

        Returns:
          the new state, and the metrics: `loss` and what the loss function returned beside it,
          means over the workers (with a sync rule and several processes: over this process's
          workers, as nothing may travel between meetings); `skipped`, the number of skipped
          updates; `branches`, which conditional exchanges took place (for `jaxcomm.traffic`).

        Raises:
          ValueError: the workers do not divide a batch leaf, or the state is of another number of
            workers.
        """
        self.workers.check_batch(batch)
        state = self._own(state)
        if self._run is None:
            self._run = self._compile(state)
        out, metrics, branches = self.workers.settle(self._run(*apart(state), batch))
        out = out[1]._replace(sync_state=out[0])
        if self._donate and not self.donates_all:
            free(state, out)
        state = out._replace(layout=state.layout)
        if self._sync is not None:
            metrics = jax.tree.map(_visible_mean, metrics)
        metrics = {**metrics, "skipped": _visible_sum(state.skipped), "branches": branches}
        return state, self.workers.settle(metrics)

    def lower(self, state: TrainState, batch):
        """The lowered program of (state, batch), see `jax.jit(f).lower`; not under pmap."""
        state = self._own(state)
        self._locate(state)
        donate = (0,) if self.donates_all else ()
        return self.workers.jit(self._step, *self._signature(), donate=donate).lower(state, batch)

    def trace(self, state: TrainState, batch):
        """The traced program of one step over the abstract worker axis, in every mode."""
        return self._traced(state, batch)[0]

    def _traced(self, state: TrainState, batch):
        """The traced program, and the shapes of what it gives."""
        state = self._checked(state)
        self._locate(state)
        fn = self.workers.trace_map(self._step, *self._signature())
        abstract = jax.tree.map(_abstract, (state, batch))
        return jax.make_jaxpr(fn, return_shape=True)(*abstract)

    def consensus(self, state: TrainState):
        """The one parameter tree to evaluate.

        It is the mean over the workers where they differ, or what the sync rule has instead
        (`SyncRule.evaluated`): an average of meetings, a server's parameters.
        """
        self._locate(self._checked(state))
        evaluated = None if self._sync is None else self._sync.evaluated

        def one_tree(params, sync_state):
            params = jax.tree.map(_over_workers, self.places.params, params)
            if evaluated is None:
                return params
            return evaluated(
                params, jax.tree.map(_over_workers, self.places.sync_state, sync_state)
            )

        if self._mean is None:
            everywhere = self.workers.sharding(Place.REPLICATED)  # None: wherever it is
            self._mean = jax.jit(one_tree, out_shardings=everywhere)
        sync_state = () if evaluated is None else state.sync_state
        return self.workers.settle(self._mean(state.params, sync_state))

    def together(
        self, fn: Callable[[TrainState], Any], state: TrainState
    ) -> tuple[TrainState, Any]:
        """`(state, fn(state))`, of something that all processes do together (see `ElasticStep`)."""
        return state, fn(state)

    def _checked(self, state: TrainState) -> TrainState:
        """The state, if it is one of as many workers; with a layout, if it has none."""
        layout = state.layout
        if layout is None or layout.workers is None:
            return state._replace(layout=self.layout)
        there, here = layout.workers.sizes, self.workers.sizes
        as_many = layout.workers.count == self.workers.count
        if there == here or (as_many and len(there) != len(here)):
            return state
        # right after a resize, perhaps by a total, all are alike but for what has its shape
        apart = as_many and layout.placed
        if not self._fits(state) or (apart and Place.PER_WORKER in jax.tree.leaves(self.places)):
            there, here = (n[0] if len(n) == 1 else n for n in (there, here))
            raise ValueError(
                f"the state is of {there} workers, this step has {here}: give it "
                f"resize_workers(state, {here})"
            )
        # nothing in it depends on their number
        layout = Layout(self._init, self.workers, self.layout.types, placed=False)
        return state._replace(layout=layout)

    def _own(self, state: TrainState) -> TrainState:
        """The checked state; one from `resize_workers` is put on this step's devices."""
        state = self._checked(state)
        layout = state.layout
        if layout is None or layout.placed:
            return state
        self._locate(state)
        if self.workers.mesh is not None and not isinstance(state.step, Tracer):
            state = jax.tree.map(self._put, self.places, state)
        return state._replace(layout=layout.at_home(self.workers))

    def _put(self, place: Place, x):
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.workers.sharding(place))
        return _storage.unpack(np.asarray(_storage.pack(x)), spec)

    def _compile(self, state: TrainState):
        """The compiled step as a function of `apart(state)` and the batch, which gives the state
        apart as well: JAX hands a donated array to the first result that is like it.
        """
        self._locate(state)
        (places, split), (_, *others) = self._signature()

        def step(sync_state, rest, batch):
            state, *others = self._step(rest._replace(sync_state=sync_state), batch)
            return apart(state), *others

        donate = (0, 1) if self.donates_all else (0,) if self._donate else ()
        here = apart(places)
        return self.workers.jit(step, (*here, split), (here, *others), donate=donate)

    @property
    def donates_all(self) -> bool:
        """Whether all of the state is written over where it lies, or the sync rule's only.

        XLA on CPU computes a new moment and, from the old one again, the update that the moment
        gives, so that it would copy what `where(finite, new, old)` is to replace.
        """
        return self._donate and (self.workers.platform != "cpu" or self._in_place)

    @property
    def _in_place(self) -> bool:
        """Whether the optimizer's step is a branch of a conditional, which copies nothing on CPU.

        So it is on CPU devices if the optimizer does not communicate: elsewhere a conditional
        waits for its predicate, and under vmap both branches run.
        """
        on_cpu = self.workers.mode != "simulate" and self.workers.platform == "cpu"
        return on_cpu and self._sync is not None and self._update_axes == ()

    def _axes_of_updates(self, state: TrainState) -> tuple[str, ...]:
        """The worker axes along which the optimizer communicates."""

        def update(state):
            zeros = jax.tree.map(jnp.zeros_like, (state.params, jnp.float32(0)))
            grads, loss = axis.varying(zeros, self.workers.axis_name)
            self._tx.update(grads, state.opt_state, state.params, value=loss)
            return ()

        found = self._collectives(update, self.layout.types, (), jax.tree.map(_abstract, state))
        _check_conditionals(found)
        return tuple(name for name in self.workers.names if any(name in c.axes for c in found))

    def _collectives(self, fn: Callable, places, out_places, state):
        """The collectives of one worker's function of its state."""
        fn = self.workers.trace_map(fn, (places,), out_places)
        sizes = dict(zip(self.workers.names, self.workers.sizes))
        return count(fn, state, axis_sizes=sizes)

    def _signature(self):
        metrics = Place.REPLICATED if self._sync is None else Place.PER_WORKER
        places = self.layout.types
        return (places, Place.SPLIT), (places, metrics, Place.REPLICATED)

    def _locate(self, state: TrainState) -> None:
        """Finds the places for a state that this object did not make, and, with a sync rule, the
        axes of the optimizer.
        """
        if self.places is None and not self._fits(state):
            raise ValueError("the state does not belong to this step: its tree or shapes differ")
        if self._update_axes is None and self._sync is not None:
            self._update_axes = self._axes_of_updates(state)

    def _fits(self, state: TrainState) -> bool:
        """Whether the state has the tree and the shapes of this step's states."""
        before = self.layout.types
        drop = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        for params in (state.params, jax.tree.map(drop, state.params)):
            if _shapes(self.abstract_state(params, state.key)) == _shapes(state):
                return True
        self.layout.types = before
        return False


def _check_conditionals(collectives) -> None:
    """Raises a ValueError if somebody else's transform decides about one of them."""
    if any(name.startswith(UNMETERED) for c in collectives for name, _ in c.when):
        raise ValueError(OWN_CONDITIONAL)


def _counts_apart(opt_state) -> str:
    """What is wrong if an exchange waits for one of this state's counters."""
    counters = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree.leaves_with_path(opt_state)
        if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) and axis.varying_axes(x)
    ]
    return (
        f"under sync each worker skips non-finite gradients by itself, so that tx's counters "
        f"{', '.join(counters)} may differ, and none of them can decide when a jaxcomm transform "
        "exchanges: take a tx without such a condition (to accumulate, optax.MultiSteps around "
        "what does not communicate), or train without sync"
    )


def apart(state: TrainState) -> tuple[Any, TrainState]:
    """The sync rule's state, and the others'."""
    return state.sync_state, state._replace(sync_state=())


def free(old, new) -> None:
    """Frees the arrays of a state that are not those of the next one as well."""
    kept = {id(x) for x in jax.tree.leaves(new)}
    for x in jax.tree.leaves(old):
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and id(x) not in kept:
            x.delete()


def _shapes(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [*map(jnp.shape, leaves)]


def _typed(key):
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _strong(x):
    """Without JAX's weak type, which the first step would drop: it would be traced twice."""
    x = jnp.asarray(x)
    return x.astype(x.dtype) if getattr(jax.typeof(x), "weak_type", False) else x


def _over_workers(place: Place, x):
    """The mean over the workers; of what has none the first worker's."""
    if place is Place.REPLICATED:
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[0]
    return (sum_rows(x.astype(jnp.float32)) / x.shape[0]).astype(x.dtype)


def _abstract(x):
    return jax.ShapeDtypeStruct(
        jnp.shape(x), jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype
    )


def _local(x):
    """The part of a (n, ...) array that this process holds."""
    if isinstance(x, Tracer) or x.is_fully_addressable:
        return x
    return np.concatenate([np.asarray(shard.data) for shard in x.addressable_shards])


def _visible_mean(x):
    return jnp.mean(_local(x), axis=0)


def _visible_sum(x):
    """A copy, where it is the state's own array, which the next step is given."""
    return jnp.copy(x) if jnp.ndim(x) == 0 else jnp.sum(_local(x))
