"""The worker axis: is it bound, how long is it, and which values differ along it.

The same algorithm runs under `jax.shard_map` (values carry their varying axes in their type),
`jax.pmap` and `jax.vmap(axis_name=...)` (they do not). Everything that must know the difference
is in this module, as is every use of JAX internals.
"""

import math

import jax
from jax import lax
from jax._src import core as _core  # no public way to list the bound axes or the current trace
from jax._src.interpreters.batching import BatchTracer
from jax.extend.core import Primitive
from jax.interpreters import mlir

AxisName = str | tuple[str, ...]


def bound() -> tuple[str, ...]:
    """The names of the axes in scope."""
    return tuple(_core.get_axis_env().axis_names())


def axes(axis_name: AxisName) -> tuple[str, ...]:
    """The axis names as a tuple, after checking that each is bound here.

    Raises:
      ValueError: an axis is not bound; names the axes that are.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        if name not in bound():
            scope = ", ".join(map(repr, bound())) or "none"
            raise ValueError(
                f"axis_name={name!r} is not bound here (axes in scope: {scope}): call this inside "
                "jax.shard_map, jax.pmap or jax.vmap with that axis_name"
            )
    return names


def size(axis_name: AxisName) -> int:
    """Number of workers along the axis (the product for a tuple), a Python int."""
    return math.prod(lax.axis_size(name) for name in axes(axis_name))


def index(axis_name: AxisName) -> jax.Array:
    """This worker's index along the axis, int32 scalar; row-major for a tuple."""
    result = lax.axis_index(axes(axis_name)[0])
    for name in axes(axis_name)[1:]:
        result = result * lax.axis_size(name) + lax.axis_index(name)
    return result


def manual(axis_name: AxisName) -> bool:
    """True if every axis belongs to a mesh (shard_map, pmap), False if one is simulated (vmap)."""
    return set(axes(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def simulated(x, axis_name: AxisName) -> bool:
    """True if vmap maps the value along the axis right here: everyone's lie in one array."""
    return isinstance(x, BatchTracer) and x._trace.axis_data.name in axes(axis_name)


def varying_axes(x) -> frozenset[str]:
    """Mesh axes along which the value differs, from its type (empty under vmap and pmap)."""
    aval = x if isinstance(x, (jax.ShapeDtypeStruct, _core.AbstractValue)) else jax.typeof(x)
    kind = getattr(aval, "mat", None) or getattr(aval, "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", None) or ())


def varying(tree, axis_name: AxisName):
    """The same values, typed as differing between the workers of the axis."""
    mesh_axes = set(axes(axis_name)) & set(jax.sharding.get_abstract_mesh().manual_axes)

    def cast(x):
        missing = tuple(sorted(mesh_axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


_equal = Primitive("jaxcomm_equal")
mlir.register_lowering(_equal, lambda _, x, names: [x])


@_equal.def_abstract_eval
def _equal_type(x, names):
    return x.update(manual_axis_type=x.mat.update(varying=x.mat.varying.difference(names)))


def equal(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The same value, typed as equal along the axis, to which the caller has seen."""
    return _equal.bind(x, names=axes(axis_name))


def match_varying(tree, types):
    """The same values, typed as varying over at least the axes of the matching leaf in `types`."""

    def cast(x, like):
        missing = tuple(sorted(varying_axes(like) - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree, types)


def current_trace():
    """The trace that JAX is recording into right now; only for identity comparison."""
    return _core.trace_ctx.trace
