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
from jax.interpreters import ad, mlir

AxisName = str | tuple[str, ...]
MISMATCH = "manual axis types do not match"  # in JAX's TypeError: some values vary, others do not


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


_equal, _different = Primitive("jaxcomm_equal"), Primitive("jaxcomm_different")
for _primitive, _other in (_equal, _different), (_different, _equal):
    mlir.register_lowering(_primitive, lambda _, x, names: [x])
    ad.deflinear(_primitive, lambda ct, names, other=_other: [other.bind(ct, names=names)])


_equal.def_abstract_eval(lambda x, names: _typed(x, x.mat.varying.difference(names)))
_different.def_abstract_eval(lambda x, names: _typed(x, x.mat.varying.union(names)))


def _typed(x, names):
    """The type with these varying axes; that of a constant may not know the mesh."""
    sharding = x.sharding.update(mesh=jax.sharding.get_abstract_mesh())
    return x.update(sharding=sharding, manual_axis_type=x.mat.update(varying=names))


def equal(tree, axis_name: AxisName):
    """The same values, typed as equal along the axis, to which the caller has seen."""
    return jax.tree.map(lambda x: _equal.bind(x, names=axes(axis_name)), tree)


def different(tree, axis_name: AxisName):
    """`equal` undone. Unlike that of `varying`, its gradient is not summed over the axis."""
    return jax.tree.map(lambda x: _different.bind(x, names=axes(axis_name)), tree)


def match_varying(tree, types):
    """The same values, typed as varying over at least the axes of the matching leaf in `types`."""

    def cast(x, like):
        missing = tuple(sorted(varying_axes(like) - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree, types)


def current_trace():
    """The trace that JAX is recording into right now; only for identity comparison."""
    return _core.trace_ctx.trace
