"""Do the replicas still hold the same bits? A checksum of every leaf, compared over the workers.

JAX's types prove that replicated state is computed alike, not that all devices have: bad memory, a
host that read another file or runs another library can leave its copy different, and nothing that
looks at "the" value of a replicated array sees it. Here every device's own copy is looked at. A
worker sends 4 bytes, a sum over its leaves; only where those differ, 4 bytes a leaf.

    h(leaf) = sum_i mix(bits_i + i * 0x9e3779b9)   mod 2^32,   mix: the finalizer of MurmurHash3

is a sum of integers, so that its order does not matter; any single wrong word changes it.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomm.collectives import all_gather
from jaxcomm.training import _storage
from jaxcomm.training.workers import Place, Workers

PART = "checksum"  # the name of what travels
_GOLDEN = 0x9E3779B9
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class DivergenceError(ValueError):
    """Two workers hold different bits of what they share; the message is one sentence."""


class ReplicaCheck:
    """`check(state)` raises if workers disagree; every process calls it at the same step.

    Compared are all replicated leaves on the worker mesh and, right after a meeting whose rule has
    one anchor (`met=True`), the parameters of all workers. Simulated workers, and those of pmap,
    share one copy of a replicated leaf: there only the parameters are compared. State on the host
    devices of a background channel is not.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm, optax
      >>> from jaxcomm.training.consistency import ReplicaCheck
      >>> tx = optax.chain(jaxcomm.average("workers"), optax.sgd(0.1))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers")
      >>> ReplicaCheck()(step.init(jnp.zeros(3), jax.random.key(0)))
    """

    def __init__(self):
        self._workers: Workers | None = None

    def __call__(self, state, *, met: bool = False) -> None:
        """Compares the copies of the state.

        Args:
          state: a TrainState.
          met: the replicas have met in the step that made it.

        Raises:
          DivergenceError: names the leaf, the workers whose bits are not those of most, and the
            step.
        """
        layout = state.layout
        if layout is None or layout.places is None or layout.workers.count == 1:
            return
        shared, own = _leaves(state, met)
        if not shared and not own:
            return
        digests = self._gathered(layout.workers, shared, own)
        if digests is not None:
            _judge(digests, [*shared, *own], int(state.step), layout.workers)

    def _gathered(self, workers: Workers, shared: dict, own: dict) -> np.ndarray | None:
        """(workers, leaves) checksums, or None if all workers agree."""
        if workers is not self._workers:
            places = (Place.SPLIT, Place.PER_WORKER), (Place.REPLICATED, Place.PER_WORKER)
            exchange = functools.partial(_exchange, workers.axis_name)
            self._workers, self._run = workers, workers.jit(exchange, *places)
        copies = [_copies(x, workers) for x in shared.values()]
        totals, digests = workers.settle(self._run(copies, list(own.values())))
        if len(set(np.asarray(totals).tolist())) == 1:
            return None
        return np.asarray(_storage.gathered(digests))


def _leaves(state, met: bool) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """By path: what has a copy on every device of the worker mesh, and parameters that met."""
    mesh, places = state.layout.workers.mesh, _storage.flatten(state.layout.places)
    leaves = {k: _storage.pack(x) for k, x in _storage.flatten(state).items() if x.size}
    shared = {
        path: x
        for path, x in leaves.items()
        if mesh is not None
        and isinstance(x, jax.Array)
        and places[path] is Place.REPLICATED
        and x.sharding.is_fully_replicated
        and x.sharding.device_set == set(mesh.devices.flat)
    }
    apart = lambda path: path.startswith(".params") and places[path] is Place.PER_WORKER
    own = {path: x for path, x in leaves.items() if apart(path)}
    return shared, own if met and _one_anchor(state) else {}


def _one_anchor(state) -> bool:
    """Whether a meeting of the state's rule, all leaves at a time, makes the parameters equal."""
    rule, places = state.sync_state, state.layout.places.sync_state
    while hasattr(rule, "rule"):
        rule, places = rule.rule, places.rule
    anchor = set(jax.tree.leaves(getattr(places, "anchor", None)))
    return anchor == {Place.REPLICATED} and np.ndim(rule.next_sync) == 0


def _copies(x: jax.Array, workers: Workers) -> jax.Array:
    """Every device's copy, one after the other, as one array; nothing is moved."""
    copies = [shard.data if x.ndim else shard.data[None] for shard in x.addressable_shards]
    rows = workers.count * (x.shape[0] if x.ndim else 1)
    sharding = workers.sharding(Place.SPLIT)
    return jax.make_array_from_single_device_arrays((rows, *x.shape[1:]), sharding, copies)


def _exchange(axis_name, copies, own):
    """Everyone's sum over the leaves, replicated, and this worker's checksums."""
    digests = jnp.stack([checksum(x) for x in [*copies, *own]])
    return all_gather(checksum(digests), axis_name, PART), digests


def checksum(x: jax.Array) -> jax.Array:
    """The uint32 checksum of an array's bits."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).reshape(-1).astype(jnp.uint32)
    places = lax.iota(jnp.uint32, words.size) * jnp.uint32(_GOLDEN)
    return jnp.sum(_mix(words + places), dtype=jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _judge(digests: np.ndarray, names: list[str], step: int, workers: Workers) -> None:
    """Names the first leaf that differs and the workers that are not with the most."""
    wrong = [i for i in range(len(names)) if len(set(digests[:, i].tolist())) > 1]
    if not wrong:
        return
    column = digests[:, wrong[0]].tolist()
    common = Counter(column).most_common(1)[0][0]
    odd = [_name(i, workers) for i, digest in enumerate(column) if digest != common]
    more = f" and {len(wrong) - 1} more leaves" if len(wrong) > 1 else ""
    raise DivergenceError(
        f"after step {step} the replicas differ: {', '.join(odd)} of {workers.count} "
        f"hold{'s' * (len(odd) == 1)} other bits of {names[wrong[0]]}{more} than the others; "
        "stopped before anything is saved"
    )


def _name(worker: int, workers: Workers) -> str:
    if workers.mesh is None or jax.process_count() == 1:
        return f"worker {worker}"
    names = workers.mesh.axis_names
    order = [*(names.index(n) for n in workers.names), *range(len(names))]
    grid = np.transpose(workers.mesh.devices, list(dict.fromkeys(order)))
    device = grid.reshape(workers.count, -1)[worker, 0]
    return f"worker {worker} (process {device.process_index})"
