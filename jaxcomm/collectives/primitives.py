"""Every collective of the library passes here: the only module that calls `jax.lax` collectives.

Three rules. What is narrow travels as unsigned integers of the same width, because XLA on CPU
widens bf16, fp8 and int4 collectives silently. What is summed is float32. Each call is named in
the program (`jaxcomm.wire.<part>`), so that a traffic report can tell payload from metadata.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.collectives import axis
from jaxcomm.collectives.axis import AxisName

SCOPE = "jaxcomm.wire."
_WIRE = {1: jnp.uint8, 2: jnp.uint16}


def _to_wire(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype.itemsize > 2:
        return x
    return lax.bitcast_convert_type(x, _WIRE[x.dtype.itemsize])


def _from_wire(x: jax.Array, dtype) -> jax.Array:
    if x.dtype == dtype:
        return x
    return x.astype(dtype) if dtype == jnp.bool_ else lax.bitcast_convert_type(x, dtype)


def all_sum(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Sum over the workers, replicated; same shape and dtype, summed in float32 if narrower."""
    names = axis.axes(axis_name)
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    with jax.named_scope(SCOPE + part):
        return lax.psum(axis.varying(wide, names), names).astype(x.dtype)


def all_max(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Maximum over the workers, replicated."""
    names = axis.axes(axis_name)
    with jax.named_scope(SCOPE + part):
        return lax.pmax(axis.varying(x, names), names)


def all_gather(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Everyone's x, replicated: (...) -> (n, ...)."""
    names = axis.axes(axis_name)
    wire = axis.varying(_to_wire(x), names)
    with jax.named_scope(SCOPE + part):
        if axis.manual(names):
            wire = lax.all_gather(wire, names, to="invarying")
        else:  # vmap takes one axis at a time, and on jax 0.10 refuses `to=`
            for name in reversed(names):
                to = "invarying" if axis.manual(name) else "varying"
                wire = lax.all_gather(wire, name, **({"to": to} if axis.manual(name) else {}))
            wire = wire.reshape((axis.size(names), *x.shape))
    return _from_wire(wire, x.dtype)


def all_to_all(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Row j goes to worker j: (n, ...) -> (n, ...), row i of the result came from worker i."""
    names = axis.axes(axis_name)
    wire = axis.varying(_to_wire(x), names)
    with jax.named_scope(SCOPE + part):
        if len(names) == 1 or axis.manual(names):
            wire = lax.all_to_all(wire, names if len(names) > 1 else names[0], 0, 0)
        else:
            wire = wire.reshape(*(axis.size(name) for name in names), *x.shape[1:])
            for i, name in enumerate(names):
                wire = lax.all_to_all(wire, name, i, i)
            wire = wire.reshape(x.shape)
    return _from_wire(wire, x.dtype)


def shift(x: jax.Array, axis_name: str, by: int = 1, part: str = "values") -> jax.Array:
    """Sends x to the worker `by` places ahead on the ring; returns what came from behind."""
    (name,) = axis.axes(axis_name)
    n = axis.size(name)
    pairs = [(i, (i + by) % n) for i in range(n)]
    with jax.named_scope(SCOPE + part):
        wire = lax.ppermute(axis.varying(_to_wire(x), name), name, pairs)
    return _from_wire(wire, x.dtype)
