"""What sparse codecs share: k values at k positions, and scatter-adds to sum n of them."""

import abc
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.compressors.base import Compressor, Payload, require_whole


class Sparsifier(Compressor):
    """A codec that keeps `count(size)` values; `compose` replaces how those values travel."""

    @abc.abstractmethod
    def count(self, size: int) -> int:
        """Values kept of a vector of this size."""

    @abc.abstractmethod
    def select(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Payload]:
        """The kept float32 values, shape (count,), and the metadata that locates them."""

    @abc.abstractmethod
    def positions(self, metadata: Payload, size: int) -> jax.Array:
        """int32 positions, shape (count,), of the kept values in the coded vector.

        A position of `coded_size` or more holds none: its value is dropped.
        """

    def coded_size(self, size: int) -> int:
        """Length of the vector that `positions` points into."""
        return size

    def synthesize(self, coded: jax.Array, size: int) -> jax.Array:
        """The vector from the coded one; linear, so that sums may be taken before it."""
        del size
        return coded

    def place(self, values: jax.Array, metadata: Payload, size: int) -> jax.Array:
        """The vector of shape (size,) with these values in place; n stacked parts are summed.

        One part after another: positions are then unique, and the sum does not depend on the order
        in which an accelerator adds, so that replicas stay equal to the last bit.
        """

        def add(total, part):
            where, values = part
            return total.at[where].add(values, mode="drop", unique_indices=True), None

        locate = lambda m: self.positions(m, size)
        coded = jnp.zeros((self.coded_size(size),), jnp.float32)
        if values.ndim == 1:
            coded, _ = add(coded, (locate(metadata), values))
        else:
            where = jax.vmap(locate)(metadata)
            coded, _ = add(coded, (where[0], values[0]))  # as varying as the others
            coded, _ = lax.scan(add, coded, (where[1:], values[1:]))
        return self.synthesize(coded, size)

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        values, metadata = self.select(x, key)
        return {"values": lax.bitcast_convert_type(values, jnp.uint32), **metadata}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        metadata = {name: part for name, part in payload.items() if name != "values"}
        values = lax.bitcast_convert_type(payload["values"], jnp.float32)
        return self.place(values, metadata, size)

    def decode_sum(
        self, payloads: Payload, size: int, coefficients: jax.Array | None = None
    ) -> jax.Array:
        metadata = {name: part for name, part in payloads.items() if name != "values"}
        values = lax.bitcast_convert_type(payloads["values"], jnp.float32)
        weighted = values if coefficients is None else coefficients[:, None] * values
        return self.place(weighted, metadata, size)


def check_fraction_or_k(name: str, fraction: float | None, k: int | None) -> int | None:
    """Exactly one of `fraction` in (0, 1] and a whole `k` >= 1; returns k as an int, or None."""
    if (fraction is None) == (k is None):
        raise ValueError(f"{name}: give exactly one of fraction and k, got {fraction=}, {k=}")
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise ValueError(f"{name}: fraction must be in (0, 1], got {fraction}")
    return None if k is None else require_whole(f"{name}: k", k, 1)


def kept(fraction: float | None, k: int | None, size: int) -> int:
    """ceil(fraction * size), so that 0.07 of 100 is 7 and not 8, or k if it fits."""
    if size == 0:
        return 0
    if k is None:
        assert fraction is not None
        return min(size, max(1, math.ceil(fraction * size * (1 - 1e-12))))
    if k > size:
        raise ValueError(f"k must be at most the vector's size, got k={k} for size {size}")
    return k
