"""A program with its communication removed: one worker alone, who imagines n equal ones.

What is exposed of a step's communication is the step's time minus the same step's time without it;
and codecs cost what they cost without a wire. Each collective gives what it would give if all
workers held the same values (a sum is n times the operand, a gather n copies of it), except that
the worker's index is 0; shapes, branches and the work on what was "received" stay. No axis is
bound, no device beyond one takes part, so that the n-th worker of 4,096 can be timed on a laptop.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.traffic.count import OPS, named_axes


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
    return lambda *leaves: _run(jaxpr.jaxpr, jaxpr.consts, leaves, axis_sizes)


def _run(jaxpr, consts, leaves: Sequence, sizes: dict[str, int]) -> list:
    if len(leaves) != len(jaxpr.invars):
        raise ValueError(f"the program takes {len(jaxpr.invars)} arrays, got {len(leaves)}")
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *leaves)))
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
    for eqn in jaxpr.eqns:
        out = stand_in(eqn, [read(atom) for atom in eqn.invars], sizes)
        values.update(zip(eqn.outvars, out))
    return [read(atom) for atom in jaxpr.outvars]


def stand_in(eqn, args: list, sizes: dict[str, int]) -> list:
    """What an equation gives without communication."""
    name, params = eqn.primitive.name, eqn.params
    if axes := named_axes(eqn):
        return _stand_ins(eqn, args, math.prod(sizes.get(axis, 1) for axis in axes))
    if name == "cond":
        runs = [lambda *ops, b=b: _closed(b, ops, sizes) for b in params["branches"]]
        return lax.switch(args[0], runs, *args[1:])
    if name == "scan":
        return _scan(eqn, args, sizes)
    if name == "while":
        return _while(params, args, sizes)
    if (inner := _inlined(params)) is not None:
        return _closed(inner, args, sizes)
    return bind(eqn, args)


def bind(eqn, args: list) -> list:
    """What an equation gives."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _closed(jaxpr, args, sizes) -> list:
    open_, consts = (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, ())
    return _run(open_, consts, args, sizes)


def _inlined(params):
    """The one sub-program of a call (jit, shard_map, remat, custom derivatives), if it is one."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if inner is not None and hasattr(getattr(inner, "jaxpr", inner), "eqns"):
            return inner
    return None


def _scan(eqn, args, sizes) -> list:
    params, inner = eqn.params, eqn.params["jaxpr"].jaxpr
    # what is scanned over or stacked has one axis more outside; JAX's own names for it change
    same = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside))
    n_carry = same(eqn.outvars, inner.outvars)
    n_consts = same(eqn.invars, inner.invars) - n_carry
    consts, carry, xs = args[:n_consts], args[n_consts:][:n_carry], args[n_consts + n_carry :]

    def body(carry, x):
        out = _closed(params["jaxpr"], (*consts, *carry, *x), sizes)
        return out[:n_carry], out[n_carry:]

    options = {"length": params["length"], "reverse": params["reverse"]}
    carry, ys = lax.scan(body, carry, xs, unroll=params["unroll"], **options)
    return [*carry, *ys]


def _while(params, args, sizes) -> list:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    test, consts, carry = args[:a], args[a : a + b], args[a + b :]
    return lax.while_loop(
        lambda carry: _closed(params["cond_jaxpr"], (*test, *carry), sizes)[0],
        lambda carry: _closed(params["body_jaxpr"], (*consts, *carry), sizes),
        carry,
    )


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
