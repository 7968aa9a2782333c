"""What every communicating transform shares: its type, its keys, its checks."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging

from jaxcomm.collectives import AxisName, all_sum, flatten, index, size
from jaxcomm.collectives.left_dense import note_left_dense
from jaxcomm.compressors.base import Compressor

#: Name of the exchange of leaves that a rule leaves uncompressed; the traffic report lists it.
DENSE_PART = "dense"


class Communication(optax.GradientTransformationExtraArgs):
    """An Optax transform that averages over workers and keeps the direction of its input.

    `periodic` knows by this type that the result is an averaged displacement and not yet a step
    downhill, so that a bare `average(axis_name)` is local SGD.
    """


class CountState(NamedTuple):
    """State of a transform that only counts its messages."""

    count: jax.Array  # shape=(), dtype=jnp.int32


def message_key(
    seed: int | jax.Array, count: jax.Array, axis_name: AxisName, compressor: Compressor
) -> jax.Array:
    """PRNG key of message number `count`: one per worker, or shared if the codec asks for it."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    return key if compressor.shared_key else jax.random.fold_in(key, index(axis_name))


def check_compressor(compressor: Compressor, where: str) -> None:
    """Raises a TypeError if the arguments were confused."""
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"{where}: compressor must be a jaxcomm compressor such as top_k(0.01), "
            f"got {compressor!r}"
        )


def check_fixed(value, name: str, where: str) -> None:
    """Raises a ValueError for an array: the program is built from this number."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{where}: {name} must be a Python number, not an array; under "
            "optax.inject_hyperparams name it in static_args"
        )


def zero_count() -> jax.Array:
    """A message counter at its start."""
    return jnp.zeros((), jnp.int32)


def partition(tree, keep: Callable[[jax.Array], bool]):
    """The tree twice: with the leaves that `keep` accepts, and with the others.

    Missing leaves are `optax.MaskedNode()`, which JAX counts as none; `combine` undoes it.
    """
    one = lambda wanted: jax.tree.map(
        lambda leaf: leaf if bool(keep(leaf)) is wanted else optax.MaskedNode(), tree
    )
    return one(True), one(False)


def combine(first, second):
    """The tree that `partition` took apart."""
    return jax.tree.map(lambda a, b: b if is_masked(a) else a, first, second, is_leaf=is_masked)


def is_masked(node) -> bool:
    """Whether it stands for a leaf that is missing."""
    return isinstance(node, optax.MaskedNode)


def mean_left_dense(tree, axis_name: AxisName):
    """Dense mean, float32, of leaves that a rule leaves uncompressed; named so in the program."""
    vector, unflatten = flatten(tree)
    if vector.size:
        vector = all_sum(vector, axis_name, DENSE_PART) / size(axis_name)
    return unflatten(vector, jnp.float32)


def log_dense(where: str, leaves: Sequence[str], reason: str) -> None:
    """Logs, once a process, which leaves stay uncompressed and why; no leaves, no line.

    Call it in `init_fn` or `update_fn`: the traffic report learns of them while it traces these.
    """
    note_left_dense(where, leaves, reason)
    if leaves:
        _log_once(f"{where}: {len(leaves)} leaves stay dense ({reason}): {', '.join(leaves)}")


@functools.lru_cache(maxsize=4096)
def _log_once(message: str) -> None:
    logging.info(message)


def leaf_names(tree) -> list[str]:
    """Names of the leaves, such as `['layer']['bias']`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
