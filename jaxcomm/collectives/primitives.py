"""Every collective of the library passes here: the only module that calls `jax.lax` collectives.

Three rules. What is narrow travels as unsigned integers of the same width, because XLA on CPU
widens bf16, fp8 and int4 collectives silently. What is summed is float32. Each call is named in
the program (`jaxcomm.wire.<part>`), so that a traffic report can tell payload from metadata.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.collectives import axis
from jaxcomm.collectives.axis import AxisName

SCOPE = "jaxcomm.wire."
FEW = 1024  # elements that are not worth a gather
_WIRE = {1: jnp.uint8, 2: jnp.uint16}


def _names(axis_name: AxisName) -> tuple[str, ...]:
    names = axis.axes(axis_name)
    if not axis.manual(names) and any(map(axis.manual, names)):
        raise ValueError(
            f"axis_name={names!r} mixes axes of the mesh with axes that vmap simulates; a "
            "collective needs all of one kind"
        )
    return names


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


def _widen(x: jax.Array) -> jax.Array:
    """x in the type that it is reduced in: 32 bits at least."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ or x.dtype.itemsize < 4 else x


def all_sum(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Sum over the workers, replicated.

    Floats keep their dtype and are summed in float32 if narrower. Narrow integers and booleans are
    summed in int32, and the result is int32: a sum of int8 need not fit into int8.
    """
    names = _names(axis_name)
    wide = _widen(x)
    if axis.simulated(x, names) and x.size > FEW:  # psum would be a reduction over axis 0
        total = sum_rows(all_gather(wide, names, part))
    else:
        with jax.named_scope(SCOPE + part):
            total = lax.psum(axis.varying(wide, names), names)
    return total.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else total


def all_max(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Maximum over the workers, replicated; same shape and dtype."""
    names = _names(axis_name)
    wide = _widen(x)
    with jax.named_scope(SCOPE + part):
        best = lax.pmax(axis.varying(wide, names), names)
    return best.astype(x.dtype)


def scatter_sum(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Row r of the workers' sum, on worker r: (n, ...) -> (...), in float32 or wider.

    An all-to-all and a local sum: the bytes of a reduce-scatter, terms always added in the order
    of the workers, and none of the faults of psum_scatter over gloo (slow, jax#40830, #40831).
    """
    return sum_rows(all_to_all(_widen(x), axis_name, part))


def sum_rows(x: jax.Array) -> jax.Array:
    """The sum of rows, (n, ...) -> (...), added in their order.

    On CPU a reduction over axis 0 takes 40 times as long (jax 0.10, float32, 40,000 columns and
    more). Few rows are one elementwise pass, which fuses with its neighbours; many a product.
    """
    n = x.shape[0]
    if n <= 16:
        return sum((x[i] for i in range(1, n)), start=x[0])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.sum(0)
    return jnp.tensordot(jnp.ones(n, x.dtype), x, 1, precision=lax.Precision.HIGHEST)


def all_gather(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Everyone's x, replicated: (...) -> (n, ...)."""
    names = _names(axis_name)
    wire = axis.varying(_to_wire(x), names)
    with jax.named_scope(SCOPE + part):
        if axis.manual(names):
            wire = lax.all_gather(wire, names, to="invarying")
        else:  # vmap takes one axis at a time, and on jax 0.10 refuses `to=`
            for name in reversed(names):
                wire = lax.all_gather(wire, name)
            wire = wire.reshape((axis.size(names), *x.shape))
    return _from_wire(wire, x.dtype)


def all_to_all(x: jax.Array, axis_name: AxisName, part: str = "values") -> jax.Array:
    """Row j goes to worker j: (n, ...) -> (n, ...), row i of the result came from worker i."""
    names = _names(axis_name)
    wire = axis.varying(_to_wire(x), names)
    with jax.named_scope(SCOPE + part):
        if axis.manual(names):
            wire = lax.all_to_all(wire, names, 0, 0)
        else:
            wire = wire.reshape(*(axis.size(name) for name in names), *x.shape[1:])
            for i, name in enumerate(names):
                wire = lax.all_to_all(_mapped(wire, name), name, i, i)
            wire = wire.reshape(x.shape)
    return _from_wire(wire, x.dtype)


def _mapped(x: jax.Array, name: str) -> jax.Array:
    """x as a value that vmap maps over `name`: all_to_all of others comes out wrong (jax 0.12)."""
    return lax.select(lax.axis_index(name) >= 0, x, x)


def permute(
    x: jax.Array, axis_name: AxisName, ends: Sequence[int], part: str = "values"
) -> jax.Array:
    """Sends x of worker i to worker ends[i], a permutation; several axes only under shard_map."""
    names = _names(axis_name)
    wire = axis.varying(_to_wire(x), names)
    with jax.named_scope(SCOPE + part):
        wire = lax.ppermute(wire, names[0] if len(names) == 1 else names, [*enumerate(ends)])
    return _from_wire(wire, x.dtype)


def shift(x: jax.Array, axis_name: AxisName, by: int = 1, part: str = "values") -> jax.Array:
    """Sends x to the worker `by` places ahead on the ring; returns what came from behind.

    A tuple of axes is one ring, in the row-major order of `axis.index`.
    """
    names = _names(axis_name)
    wire = axis.varying(_to_wire(x), names)
    with jax.named_scope(SCOPE + part):
        if len(names) == 1 or axis.manual(names):
            wire = _permute(wire, names[0] if len(names) == 1 else names, by)
        else:
            wire = _shift_nested(wire, names, by)
    return _from_wire(wire, x.dtype)


def _permute(x: jax.Array, names: AxisName, by: int) -> jax.Array:
    n = axis.size(names)
    return lax.ppermute(x, names, [(i, (i + by) % n) for i in range(n)]) if by % n else x


def _shift_nested(x: jax.Array, names: tuple[str, ...], by: int) -> jax.Array:
    """`shift` with one axis at a time, for vmap: what leaves the last axis carries to the next."""
    *outer, last = names
    carry, by = divmod(by, axis.size(last))
    x = _permute(x, last, by)
    if not outer:
        return x
    wrapped = lax.axis_index(last) < by
    ahead = _shift_nested(x, tuple(outer), carry + 1)
    return jnp.where(wrapped, ahead, _shift_nested(x, tuple(outer), carry))
