"""Which state differs between workers, read off JAX's own types.

Where the user puts the collective in an Optax chain decides what is per-worker (an error memory, a
local momentum) and what is replicated (Adam's moments after an average). Nobody declares it: the
step is traced inside shard_map on an abstract mesh, where every value's type names the axes along
which it varies. What comes out varying is fed back as varying until nothing changes.
"""

from collections.abc import Callable

import jax

from jaxcomm.collectives import axis
from jaxcomm.training.workers import Place, Workers


def infer_places(init: Callable, step: Callable, workers: Workers, *inputs):
    """The Place of every leaf of the state, and the abstract global state.

    Args:
      init: `(*inputs) -> state`, per worker, inside the axis.
      step: `state -> state`, per worker, inside the axis.
      workers: how many, and along which axis.
      *inputs: abstract replicated arguments of `init`.

    Raises:
      ValueError: the step changes the structure, a shape or a dtype of the state.
    """
    state, places = _trace(init, workers, inputs, (Place.REPLICATED,) * len(inputs))
    while True:
        new_state, new = _trace(step, workers, (_global(places, state, workers),), (places,))
        _check_same(state, new_state)
        union = jax.tree.map(lambda a, b: a if a is Place.PER_WORKER else b, places, new)
        if union == places:
            return places, _global(places, state, workers)
        places = union


def _trace(fn: Callable, workers: Workers, args, arg_places):
    """What one worker sees of fn's result, abstractly, and the Place of each leaf."""
    found = {}

    def body(*args):
        out = fn(*args)
        found["state"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
        found["places"] = jax.tree.map(lambda x: _place(x, workers), out)
        return out

    jax.eval_shape(workers.trace_map(body, arg_places, Place.PER_WORKER), *args)
    return found["state"], found["places"]


def _place(x, workers: Workers) -> Place:
    varies = axis.varying_axes(x) & set(workers.names)
    return Place.PER_WORKER if varies else Place.REPLICATED


def _global(places, state, workers: Workers):
    """The abstract global state: per-worker leaves get their leading worker axis."""

    def leaf(place, x):
        shape = (workers.count, *x.shape) if place is Place.PER_WORKER else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(leaf, places, state)


def _check_same(old, new) -> None:
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
