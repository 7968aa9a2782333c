"""One per-worker function, three ways to run it: shard_map, pmap, vmap.

Every argument and result is placed leaf by leaf:
  REPLICATED  one value that all workers share; stored once.
  PER_WORKER  each worker has its own; stored with a leading worker axis of length n. `Along` some
              axes only it is alike on those that differ in the other axes alone.
  SPLIT       a batch: axis 0 is cut into n contiguous parts, worker i gets the i-th.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm.collectives import axis as axis_lib
from jaxcomm.collectives.axis import AxisName
from jaxcomm.training._between_hosts import between_hosts


class Place(enum.Enum):
    """Where a leaf lives."""

    REPLICATED = "replicated"
    PER_WORKER = "per worker"
    SPLIT = "split"


@dataclass(frozen=True)
class Along:
    """PER_WORKER for whoever stores it; inside, its type says that it varies along these axes."""

    names: tuple[str, ...]


class Workers:
    """n workers along an axis, on a mesh, under pmap, or simulated.

    Args:
      axis_name: name of the worker axis, or a tuple of names.
      mesh: run under shard_map on this mesh, which has these axes.
      simulate: run this many workers (a tuple for a tuple of names) on one device under vmap.
      pmap: run under pmap on the first so many local devices.

    Raises:
      ValueError: more than one way is named, or an axis is not one of the mesh's.
    """

    def __init__(
        self,
        axis_name: AxisName,
        mesh: Mesh | None = None,
        simulate: int | tuple[int, ...] | None = None,
        pmap: int | None = None,
    ):
        if sum(way is not None for way in (mesh, simulate, pmap)) > 1:
            raise ValueError("give only one of mesh=, simulate= and pmap=")
        self.axis_name = axis_name
        self.names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        self.mode = (
            "simulate" if simulate is not None else "pmap" if pmap is not None else "devices"
        )
        if self.mode == "devices":
            self.mesh = _automatic(mesh) if mesh is not None else _default_mesh(self.names)
            for name in self.names:
                if name not in self.mesh.axis_names:
                    raise ValueError(
                        f"axis_name={name!r} is not an axis of the mesh, whose axes are "
                        f"{', '.join(map(repr, self.mesh.axis_names))}"
                    )
            self.sizes = tuple(self.mesh.shape[name] for name in self.names)
        else:
            count = simulate if simulate is not None else pmap
            assert count is not None
            self.sizes = count if isinstance(count, tuple) else (count,)
            self.mesh = None
        if len(self.sizes) != len(self.names) or any(s < 1 for s in self.sizes):
            raise ValueError(f"axes {self.names} cannot have the sizes {self.sizes}")
        if self.mode == "pmap" and (
            len(self.names) > 1 or self.sizes[0] > jax.local_device_count()
        ):
            raise ValueError(
                f"pmap needs one axis and at most {jax.local_device_count()} workers (the local "
                f"devices), got axes {self.names} of sizes {self.sizes}"
            )
        self.count = math.prod(self.sizes)
        local = [] if self.mesh is None else self.mesh.local_devices
        if self.mode == "pmap":
            local = jax.local_devices()[: self.count]
        self._share_threads = len(local) > 1 and local[0].platform == "cpu"

    @property
    def platform(self) -> str:
        """Of the devices: 'cpu', 'gpu', 'tpu'."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    @property
    def on_hosts(self) -> bool:
        """Whether the workers are CPU devices of several processes."""
        devices = [] if self.mesh is None else self.mesh.devices.flat
        return self.platform == "cpu" and len({d.process_index for d in devices}) > 1

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """A mesh with the worker axes for tracing; no devices are needed."""
        if self.mesh is not None:
            return self.mesh.abstract_mesh
        return AbstractMesh(self.sizes, self.names, axis_types=(AxisType.Auto,) * len(self.names))

    def trace_map(self, fn: Callable, in_places, out_places) -> Callable:
        """`fn` under shard_map on the abstract mesh, whatever the mode: for tracing only."""
        return self._shard_map(fn, in_places, out_places, self.abstract_mesh)

    def map(self, fn: Callable, in_places, out_places) -> Callable:
        """`fn(*per-worker views) -> per-worker views` as a function of global arrays.

        `in_places` is a tuple with one tree (or prefix) of Place an argument, `out_places` a tree
        or prefix for the result.
        """
        if self.mode == "devices":
            fn = between_hosts(fn) if self.on_hosts else fn
            return self._shard_map(fn, in_places, out_places, self.mesh)
        return self._simulated(fn, in_places, out_places)

    def jit(self, fn: Callable, in_places, out_places, donate: tuple[int, ...] = ()) -> Callable:
        """`map`, compiled; buffers of the arguments in `donate` are reused."""
        if self.mode != "pmap":
            return jax.jit(self.map(fn, in_places, out_places), donate_argnums=donate)
        workers = np.arange(self.count)  # pmap wants one mapped argument
        call = jax.pmap(
            lambda _, *args: fn(*args),
            axis_name=self.names[0],
            devices=jax.local_devices()[: self.count],
            in_axes=(0, *_axes(in_places)),
            out_axes=_axes(out_places),
            donate_argnums=tuple(i + 1 for i in donate),
        )
        return lambda *args: call(workers, *self._split(args, in_places))

    def sharding(self, place: Place) -> NamedSharding | None:
        """How a leaf is laid out over the devices (None when simulated)."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, self._spec(place))

    def settle(self, result):
        """Waits for the result where two programs in flight could block each other.

        The CPU devices of one process share one pool of threads; a program that waits in a
        collective holds its threads, and a second one can starve the first of its last thread.
        """
        if self._share_threads and not isinstance(jax.tree.leaves(result)[0], Tracer):
            jax.block_until_ready(result)
        return result

    def check_batch(self, batch) -> None:
        """Raises a ValueError naming the leaf whose axis 0 the workers do not divide."""
        for path, leaf in jax.tree.leaves_with_path(batch):
            shape = np.shape(leaf)
            if not shape or shape[0] % self.count:
                rows = shape[0] if shape else "no axis 0"
                raise ValueError(
                    f"batch leaf {jax.tree_util.keystr(path)!r} has {rows} rows, which "
                    f"{self.count} workers do not divide"
                )

    def _spec(self, place: "Place | Along") -> P:
        names = self.names[0] if len(self.names) == 1 else self.names
        return P() if place is Place.REPLICATED else P(names)

    def _shard_map(self, fn, in_places, out_places, mesh):
        def body(*args):
            args = tuple(_map_places(self._drop_axis, p, a) for p, a in zip(in_places, args))
            return _map_places(self._add_axis, out_places, fn(*args))

        specs = lambda places: jax.tree.map(self._spec, places)
        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=specs(in_places),
            out_specs=specs(out_places),
            axis_names=set(self.names),
        )

    def _drop_axis(self, place: "Place | Along", x):
        if isinstance(place, Along):
            return axis_lib.equal(x[0], self._others(place))
        return x[0] if place is Place.PER_WORKER else x

    def _others(self, place: Along) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in place.names)

    def _add_axis(self, place: "Place | Along", x):
        return x if place is Place.REPLICATED else axis_lib.varying(x, self.names)[None]

    def _simulated(self, fn, in_places, out_places):
        for name, length in zip(reversed(self.names), reversed(self.sizes)):
            in_axes, out_axes = _axes(in_places, name), _axes(out_places)
            fn = jax.vmap(fn, in_axes, out_axes, axis_name=name, axis_size=length)
        return lambda *args: self._merge(fn(*self._split(args, in_places)), out_places)

    def _split(self, args, in_places):
        def split(place, x):
            if place is Place.REPLICATED:
                return x
            rows = (np.shape(x)[0] // self.count,) if place is Place.SPLIT else ()
            tail = np.shape(x)[1:]
            if rows or len(self.sizes) > 1:
                x = x.reshape(*self.sizes, *rows, *tail)
            if isinstance(place, Along):
                x = x[tuple(slice(None) if name in place.names else 0 for name in self.names)]
            return x

        return tuple(_map_places(split, p, a) for p, a in zip(in_places, args))

    def _merge(self, out, out_places):
        if len(self.sizes) == 1:
            return out
        skip = len(self.sizes)
        join = lambda place, x: (
            x if place is Place.REPLICATED else x.reshape(self.count, *x.shape[skip:])
        )
        return _map_places(join, out_places, out)


def _automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes of the kind that infers shardings; `jax.make_mesh` gives explicit ones."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def _default_mesh(names: tuple[str, ...]) -> Mesh:
    shape = (jax.device_count(),) + (1,) * (len(names) - 1)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def _map_places(fn, places, tree):
    """Maps fn(place, leaf) over a tree, where `places` is a tree prefix."""
    is_place = lambda x: isinstance(x, (Place, Along))
    return jax.tree.map(
        lambda place, sub: jax.tree.map(lambda x: fn(place, x), sub), places, tree, is_leaf=is_place
    )


def _axes(places, name: str | None = None):
    """vmap's and pmap's out_axes; or in_axes, those of the axis of this name."""

    def mapped(place):
        elsewhere = isinstance(place, Along) and name is not None and name not in place.names
        return None if elsewhere or place is Place.REPLICATED else 0

    return jax.tree.map(mapped, places)
