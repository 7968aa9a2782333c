"""A program with its communication removed: one worker alone, who imagines n equal ones.

What is exposed of a step's communication is the step's time minus the same step's time without it;
and codecs cost what they cost without a wire. Each collective gives what it would give if all
workers held the same values (a sum is n times the operand, a gather n copies of it), except that
the worker's index is 0; shapes, branches and the work on what was "received" stay. No axis is
bound, no device beyond one takes part, so that the n-th worker of 4,096 can be timed on a laptop.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.traffic.count import OPS, named_axes
from jaxcomm.traffic.evaluate import evaluate


def without_communication(jaxpr, axis_sizes: dict[str, int]) -> Callable[..., list[jax.Array]]:
    """The program as a function of one worker's arrays, without its collectives.

    Args:
      jaxpr: a closed jaxpr, traced by `jax.make_jaxpr` with the axes in scope or (as
        `TrainStep.trace`) around a shard_map, whose blocks are then the arguments.
      axis_sizes: workers along each axis.

    Returns:
      `fn(*leaves) -> leaves`, to be compiled with jax.jit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> fn = lambda x: jax.lax.all_gather(x, "workers").sum(0)
      >>> jaxpr = jax.make_jaxpr(fn, axis_env=[("workers", 4)])(jnp.ones(2))
      >>> without_communication(jaxpr, {"workers": 4})(jnp.ones(2))
      [Array([4., 4.], dtype=float32)]
    """
    return lambda *leaves: evaluate(jaxpr, leaves, partial(stand_in, sizes=axis_sizes))


def stand_in(eqn, args: list, sizes: dict[str, int]) -> list | None:
    """What a collective gives without communication; None for other equations."""
    axes = named_axes(eqn)
    return _stand_ins(eqn, args, math.prod(sizes.get(a, 1) for a in axes)) if axes else None


def _stand_ins(eqn, args: list, n: int) -> list:
    """What the collective gives when everyone holds the same."""
    name = eqn.primitive.name.removesuffix("_start")
    if name == "axis_index":
        return [jnp.zeros((), jnp.int32)]
    outs = [var.aval for var in eqn.outvars]
    if name not in OPS:  # a change of type: nothing moves
        return args
    return [_received(name, eqn.params, x, out, n) for x, out in zip(args, outs)]


def _received(name: str, params, x, out, n: int):
    op = OPS[name]
    if op == "all-reduce":
        return x * n if "psum" in name else x
    if op == "all-gather":
        axis = params["all_gather_dimension"]
        received = jnp.concatenate([x] * n, axis) if params["tiled"] else jnp.stack([x] * n, axis)
    elif op == "reduce-scatter":
        axis = params["scatter_dimension"]
        part = lax.slice_in_dim(x, 0, x.shape[axis] // n, axis=axis)
        received = n * part.reshape(out.shape)
    elif op == "all-to-all" and not params["tiled"]:
        received = jnp.moveaxis(x, params["split_axis"], params["concat_axis"])
    else:
        received = x.reshape(out.shape)
    return lax.optimization_barrier(received)  # or XLA would decode n equal messages once
