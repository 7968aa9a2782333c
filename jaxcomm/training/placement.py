"""Which state differs between workers, read off JAX's own types.

Where the user puts the collective in an Optax chain decides what is per-worker (an error memory, a
local momentum) and what is replicated (Adam's moments after an average). Nobody declares it: the
step is traced inside shard_map on an abstract mesh, where every value's type names the axes along
which it varies. What comes out varying is fed back as varying along these axes until nothing
changes: an error memory along "hosts" leaves what depends on it equal along "chips".

A `lax.cond` in somebody else's transform (`optax.apply_if_finite(optax.trace(0.9), 3)`) wants the
types of its two branches to agree, so that its state must be typed as varying before the first pass
can say so: the smallest parts of it are with which the trace succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxcomm.collectives import axis
from jaxcomm.training.workers import Along, Place, Workers

CHUNKS = ".server_error"  # the field in which transforms keep a memory of their chunk
OWN_CONDITIONAL = (
    "a transform holds a jaxcomm transform inside a lax.cond of its own, as optax.MultiSteps and "
    "optax.apply_if_finite do, which workers may not take together: give it only what stands "
    "before or after the jaxcomm transform"
)


@jax.tree_util.register_static
class Layout:
    """What the arrays of a state alone do not say: of how many workers it is, what is per worker.

    It travels in `TrainState.layout`, a pytree node without leaves. All layouts count as equal, so
    that states of two steps have one tree structure and no program is traced again.

    Args:
      init: `(params, key) -> state` of one worker, inside the axis.
      workers: how many, and along which axis.
      places: the state's tree with Place leaves, or Along, once it is known.
      placed: False if the arrays are not yet on the devices of a step.
    """

    def __init__(
        self,
        init: Callable | None = None,
        workers: Workers | None = None,
        places=None,
        placed: bool = True,
    ):
        self.init: Any = init
        self.workers: Any = workers
        self.types: Any = places  # with Along for what varies along some axes only
        self.placed = placed

    @property
    def places(self) -> Any:
        """A tree of Place, once it is known."""
        whole = lambda place: Place.PER_WORKER if isinstance(place, Along) else place
        return jax.tree.map(whole, self.types)

    def view(self, state, workers: Workers):
        """What one of `workers` would see of the initial state; abstract."""
        drop = lambda place, x: x.shape[1:] if place is Place.PER_WORKER else x.shape
        params = jax.tree.map(
            lambda place, x: jax.ShapeDtypeStruct(drop(place, x), x.dtype),
            self.places.params,
            state.params,
        )
        key = jax.ShapeDtypeStruct(state.key.shape, state.key.dtype)
        return _trace(self.init, workers, (params, key), (Place.REPLICATED,) * 2)[0]

    def at_home(self, workers: Workers) -> Layout:
        """This layout, of arrays that are on the devices of these workers."""
        return Layout(self.init, workers, self.types)

    def __eq__(self, other):
        return isinstance(other, Layout)

    def __hash__(self):
        return hash(Layout)

    def __repr__(self):
        return f"Layout(workers={self.workers and self.workers.count})"

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):  # programs do not travel: a state from a pickle says nothing
        return Layout, ()


def infer_places(init: Callable, step: Callable, workers: Workers, *inputs):
    """The Place (or Along) of every leaf of the state, and the abstract global state.

    Args:
      init: `(*inputs) -> state`, a TrainState, per worker, inside the axis.
      step: `state -> state`, per worker, inside the axis.
      workers: how many, and along which axis.
      *inputs: abstract replicated arguments of `init`.

    Raises:
      ValueError: the step changes the structure, a shape or a dtype of the state, or a transform
        decides about a collective in a conditional of its own.
    """
    state, places = _trace(init, workers, inputs, (Place.REPLICATED,) * len(inputs))
    while True:
        places, (new_state, new) = _trace_step(step, workers, state, places)
        check_same(state, new_state)
        either = lambda a, b: _place(_names(a, workers) | _names(b, workers), workers)
        union = jax.tree.map(either, places, new)
        if jax.tree.leaves(union) == jax.tree.leaves(places):
            return places, global_state(places, state, workers)
        places = union


def _trace_step(step: Callable, workers: Workers, state, places):
    """The places with which the step can be traced, and what the trace found."""
    trace = lambda places: _trace(step, workers, (global_state(places, state, workers),), (places,))
    while True:
        try:
            return places, trace(places)
        except TypeError as error:
            if axis.MISMATCH not in str(error):
                raise
            problem = error
        places = next((wider for wider in _wider(places) if _helps(trace, wider, problem)), None)
        if places is None:
            raise ValueError(OWN_CONDITIONAL) from problem


def _helps(trace: Callable, places, problem: TypeError) -> bool:
    """Does the trace succeed with these places, or at least get further?"""
    try:
        trace(places)
    except TypeError as error:
        return str(error) != str(problem)
    return True


def _wider(places) -> Iterator:
    """The places with one more part of an optimizer's state per-worker, small parts first."""
    for field in ("opt_state", "sync_state"):
        leaves, treedef = jax.tree.flatten(getattr(places, field))
        parts = {*_parts(getattr(places, field), 0), (0, len(leaves))} if leaves else ()
        for start, stop in sorted(parts, key=lambda part: (part[1] - part[0], part)):
            marked = [Place.PER_WORKER] * (stop - start)
            wider = treedef.unflatten(leaves[:start] + marked + leaves[stop:])
            yield places._replace(**{field: wider})


def _parts(tree, start: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the leaves of every tuple in the tree; states are tuples."""
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    for child in children:
        size = len(jax.tree.leaves(child))
        if size and child is not tree:
            if isinstance(child, tuple):
                yield start, start + size
            yield from _parts(child, start)
        start += size


def _trace(fn: Callable, workers: Workers, args, arg_places):
    """What one worker sees of fn's result, abstractly, and the Place of each leaf."""
    found = {}

    def body(*args):
        out = fn(*args)
        found["state"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
        found["places"] = jax.tree.map(lambda x: _place(axis.varying_axes(x), workers), out)
        return out

    jax.eval_shape(workers.trace_map(body, arg_places, Place.PER_WORKER), *args)
    return found["state"], found["places"]


def _place(varying: frozenset[str], workers: Workers) -> Place | Along:
    names = tuple(name for name in workers.names if name in varying)
    if names == workers.names:
        return Place.PER_WORKER
    return Along(names) if names else Place.REPLICATED


def _names(place: Place | Along, workers: Workers) -> frozenset[str]:
    if isinstance(place, Along):
        return frozenset(place.names)
    return frozenset(workers.names if place is Place.PER_WORKER else ())


def global_state(places, state, workers: Workers):
    """The abstract global state: per-worker leaves get their leading worker axis."""

    def leaf(place, x):
        shape = x.shape if place is Place.REPLICATED else (workers.count, *x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(leaf, places, state)


def check_same(old, new) -> None:
    """Raises a ValueError if the structure, a shape or a dtype of the state has changed."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "the update changes the structure of the state: "
            f"{jax.tree.structure(old)} became {jax.tree.structure(new)}"
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"the update changes state leaf {jax.tree_util.keystr(path)} from "
                f"{a.dtype}{list(a.shape)} to {b.dtype}{list(b.shape)}"
            )
