"""A compressed mean in buckets: one travels while the next is coded and the last one decoded.

XLA on CPU runs the collectives and the computation of one program one after the other, so that a
compressed mean takes codec plus transfer. Here each step of each bucket is a program of its own,
dispatched by two threads: one for the collectives, one for everything else.

    gather      computing  encode 0 | encode 1 | decode 0, encode 2 | decode 1, encode 3 | ...
                wire                  gather 0   gather 1             gather 2
    two_phase   computing  encode 0 | encode 1 | average 0, encode 2 | average 1, decode 0, ...
                wire                  send 0     send 1     gather 0   send 2    gather 1

With B buckets, codec time c and transfer time t of all of them, the mean takes max(c, t) and about
min(c, t) / B instead of c + t. Both threads wait for each program before the next: XLA has as many
threads as the machine has cores, and a queue of coding would keep the transfers waiting; and two
collectives at once on one gloo connection would read each other's bytes.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxcomm.collectives.axis import AxisName
from jaxcomm.collectives.cost import exchange_bytes
from jaxcomm.collectives.means import chunk_size
from jaxcomm.compressors.base import Compressor
from jaxcomm.training._pipeline_programs import OWN, SHARED, Plan, Setting
from jaxcomm.training.workers import Place, Workers
from jaxcomm.transforms.common import check_compressor

EXCHANGES = ("two_phase", "gather")
ALIGNED = 1024  # elements: the usual block; buckets are whole blocks where they are large enough


class PipelinedMean:
    """The mean of the workers' vectors or trees, coded and sent in buckets at the same time.

    For what is averaged between two steps: parameters of local training, pseudo-gradients,
    accumulated gradients. The values are those of
    `exchange_mean(x, compressor, axis_name, key, exchange, bucket_bytes=mean.bucket_bytes(d))`.
    All processes call it together, with no other collective of theirs in flight. On CPU call
    `jaxcomm.keep_memory()` first of all: the page faults of vectors of more than 32 MB can take
    longer than the codec.

    Args:
      compressor: the codec; it sees one bucket at a time (scales by it, keeps its share of it).
      axis_name: the worker axis of the mesh, or a tuple of axes.
      exchange: 'two_phase' or 'gather' (see `exchange_mean`).
      buckets: in how many parts at most; more hide more, and each costs a few messages and a
        fraction of a millisecond: where all bytes travel in a few milliseconds, take fewer.
      mesh: the computing devices, with these axes alone; None for all devices.
      wire: the devices that make the transfers, one a worker in the same process and order. None
        for the same ones if they are CPU devices (two threads dispatch to them), else for CPU
        devices of the same hosts, as many as these have workers (JAX_NUM_CPU_DEVICES).

    Raises:
      TypeError: not a compressor.
      ValueError: an unknown exchange, buckets < 1, a mesh of other axes, or devices for the
        transfers that are too few or in other processes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm
      >>> mean = jaxcomm.PipelinedMean(jaxcomm.sign(), "workers", buckets=4)
      >>> x = {"w": jnp.ones((jax.device_count(), 3))}  # axis 0: the workers
      >>> mean(x)["w"].tolist()
      [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        compressor: Compressor,
        axis_name: AxisName,
        *,
        exchange: str = "two_phase",
        buckets: int = 8,
        mesh: Mesh | None = None,
        wire: Mesh | None = None,
    ):
        check_compressor(compressor, "PipelinedMean")
        if exchange not in EXCHANGES:
            raise ValueError(
                f"PipelinedMean: exchange must be one of {EXCHANGES}, got {exchange!r}"
            )
        if buckets < 1:
            raise ValueError(f"PipelinedMean: buckets must be at least 1, got {buckets}")
        self.compressor, self.exchange, self.buckets = compressor, exchange, buckets
        self._workers = Workers(axis_name, mesh)
        self._wire = Workers(axis_name, _wire_mesh(self._workers, wire))
        self._twins = _twins(self._workers, self._wire)
        self._setting = Setting(compressor, exchange, self._workers, self._wire)
        self._rows = self._setting.rows
        self._plans: dict[tuple, Plan] = {}

    def __call__(self, tree, key: jax.Array | None = None):
        """The mean; returns when the last bucket has arrived.

        Args:
          tree: an array of shape (n, ...) or a tree of them, real floats; axis 0 is the workers',
            over whose devices it is split.
          key: PRNG key, the same on all processes, for random codecs.

        Returns:
          The tree without axis 0, replicated; leaf dtypes kept.

        Raises:
          TypeError: a leaf is not of a real floating-point type.
          ValueError: a leaf's axis 0 is not of the workers' number.
        """
        leaves, treedef = jax.tree.flatten(tree)
        kind = (treedef, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if kind not in self._plans:
            self._check(tree)
            size = sum(leaf.size for leaf in leaves) // self._workers.count
            self._plans[kind] = Plan(self._setting, self.bucket_bytes(size), tree)
        plan = self._plans[kind]
        return plan.split(self._exchange(plan, plan.join(tree), key))

    def bucket_bytes(self, size: int) -> int:
        """Bytes of float32 in a bucket of a vector of `size` elements."""
        step = -(-chunk_size(size, self._rows) // self.buckets)
        unit = ALIGNED if step >= 8 * ALIGNED else 8
        return 4 * self._rows * unit * max(1, -(-step // unit))

    def sent_bytes(self, size: int) -> float:
        """Bytes that one worker sends for the mean of vectors of `size` elements."""
        n = self._workers.count
        return exchange_bytes(self.exchange, self.compressor, size, n, self.bucket_bytes(size))

    def _exchange(self, plan: Plan, vector, key):
        """The mean of the flat vectors, with the padding of its rows.

        A bucket is coded when the one two before it has arrived: hosts that are ahead leave the
        cores that they may share, and the memory, to what is due first.
        """
        mean, found = None, [vector] * len(plan.parts)
        hops = ("gather",) if self.exchange == "gather" else ("send", "gather")
        with ThreadPoolExecutor(1, "jaxcomm-wire") as wire:
            for tick in range(len(plan.parts) + len(hops)):
                for stage in range(len(hops) + 1):
                    i = tick - stage
                    if not 0 <= i < len(plan.parts):
                        continue
                    (steps, at), got = plan.parts[i], found[i]
                    got = got.result() if isinstance(got, Future) else got
                    if stage == len(hops):
                        mean = plan.zeros() if mean is None else mean
                        mean = self._run(steps.decode, mean, got, at[0])
                        continue
                    code = steps.average if stage else steps.encode
                    message = self._run(code, got, key, *at)
                    place = SHARED if hops[stage] == "gather" else OWN
                    hop = getattr(steps, hops[stage])
                    found[i] = wire.submit(self._transfer, message, hop, place)
        return plan.zeros() if mean is None else mean

    def _run(self, program, *args):
        return jax.block_until_ready(program(*args))

    def _transfer(self, message, hop, place: Place):
        """A collective, from computing devices to computing devices; done when it returns."""
        received = jax.block_until_ready(hop(self._move(message, self._wire, OWN)))
        return self._move(received, self._workers, place)

    def _move(self, x: jax.Array, workers: Workers, place: Place) -> jax.Array:
        """The array on these workers' devices; every process moves what it holds."""
        if not self._twins:
            return x
        shards = [jax.device_put(s.data, self._twins[s.device]) for s in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, workers.sharding(place), shards)

    def _check(self, tree) -> None:
        n = self._workers.count
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            if not leaf.shape or leaf.shape[0] != n:
                raise ValueError(
                    f"PipelinedMean: axis 0 of every leaf is the {n} workers', got the shape "
                    f"{leaf.shape} at {name!r}"
                )


def _wire_mesh(workers: Workers, wire: Mesh | None) -> Mesh:
    """The devices that make the transfers, checked."""
    mesh = workers.mesh
    assert mesh is not None
    if mesh.axis_names != workers.names:
        raise ValueError(
            "PipelinedMean needs a mesh of the worker axes alone, got the axes "
            f"{', '.join(map(repr, mesh.axis_names))}"
        )
    computing = list(mesh.devices.flat)
    if wire is None:
        return mesh if computing[0].platform == "cpu" else _on_hosts(mesh)
    homes = lambda devices: [d.process_index for d in devices]
    if wire.axis_names != mesh.axis_names or homes(wire.devices.flat) != homes(computing):
        raise ValueError(
            "PipelinedMean: wire needs the axes of mesh and its processes in the same order, got "
            f"{wire.axis_names} in {homes(wire.devices.flat)} for {mesh.axis_names} in "
            f"{homes(computing)}"
        )
    return wire


def _on_hosts(mesh: Mesh) -> Mesh:
    """CPU devices for these accelerators, one each, in the same processes."""
    homes = [d.process_index for d in mesh.devices.flat]
    free = {i: [d for d in jax.devices("cpu") if d.process_index == i] for i in homes}
    most = max(homes.count(i) for i in homes)
    if any(len(free[i]) < homes.count(i) for i in homes):
        raise ValueError(
            "PipelinedMean needs as many CPU devices as a process has workers: start with "
            f"JAX_NUM_CPU_DEVICES={most}"
        )
    hosts = np.array([free[i].pop(0) for i in homes], dtype=object).reshape(mesh.devices.shape)
    return Mesh(hosts, mesh.axis_names, axis_types=(AxisType.Auto,) * hosts.ndim)


def _twins(workers: Workers, wire: Workers) -> dict:
    """From computing devices to those of the transfers and back; empty if they are the same."""
    assert workers.mesh is not None
    assert wire.mesh is not None
    pairs = list(zip(workers.mesh.devices.flat, wire.mesh.devices.flat))
    return {} if pairs[0][0] == pairs[0][1] else dict([*pairs, *((b, a) for a, b in pairs)])
