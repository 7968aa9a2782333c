"""What every communicating transform shares: its type, its keys, its checks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, index
from jaxcomm.compressors.base import Compressor


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
    """The PRNG key of message number `count`: one per worker, or shared if the codec asks for it."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    return key if compressor.shared_key else jax.random.fold_in(key, index(axis_name))


def check_compressor(compressor: Compressor, where: str) -> None:
    """Raises a TypeError if the arguments were confused."""
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"{where}: compressor must be a jaxcomm compressor such as top_k(0.01), "
            f"got {compressor!r}"
        )


def zero_count() -> jax.Array:
    """A message counter at its start."""
    return jnp.zeros((), jnp.int32)
