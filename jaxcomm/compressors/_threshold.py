"""Top-k by a sampled threshold: one pass over the vector and no selection over all of it.

The threshold is the magnitude that a strided sample ranks at the wanted fraction (Deep Gradient
Compression's rule: stride = 1 mod 32, random start); what reaches it is sent in a fixed number of
slots, k = ceil(fraction d). Too few hits leave slots empty (position and value 0). Of too many,
every (hits/k)-th in memory order is sent, so that no part of the vector is favoured.
Source: Lin et al., Deep Gradient Compression, arXiv 1712.01887 (hits beyond k: ours).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import packing
from jaxcomm.compressors._select import (
    count,
    kth_largest,
    magnitude_bits,
    mask_words,
    positions_of,
)
from jaxcomm.compressors.base import Payload
from jaxcomm.compressors.sparse import Sparsifier, check_fraction_or_k, kept


@dataclasses.dataclass(frozen=True)
class ThresholdTopK(Sparsifier):
    """See `threshold_top_k`."""

    fraction: float
    sample: float

    def count(self, size: int) -> int:
        return kept(self.fraction, None, size)

    def select(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Payload]:
        size = x.shape[0]
        bits = packing.index_bits(size)
        if size == 0:
            return x, {"indices": packing.pack(jnp.zeros((0,), jnp.uint32), bits)}
        words = mask_words(magnitude_bits(x) >= self._threshold(x, key))
        slots, hits = self.count(size), count(words)
        rank = spread(jnp.arange(slots, dtype=jnp.int32), hits, slots)
        used = rank < hits
        where = jnp.where(used, positions_of(words, rank), 0)
        return jnp.where(used, x[where], 0.0), {"indices": packing.pack(where, bits)}

    def _threshold(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        size = x.shape[0]
        # At least 64 sampled values above the threshold: its rank is then good to some 12 %.
        wanted = min(size, max(1, round(self.sample * size), round(64 / self.fraction)))
        stride = max(1, (size // wanted - 1) // 32 * 32 + 1)
        taken = size // stride
        start = 0 if key is None else jax.random.randint(key, (), 0, stride)
        sampled = magnitude_bits(x[start + stride * jnp.arange(taken, dtype=jnp.int32)])
        rank = max(1, round(self.fraction * taken))
        return jnp.maximum(kth_largest(sampled, rank), 1)  # zeros are no hits

    def positions(self, metadata: Payload, size: int) -> jax.Array:
        slots = self.count(size)
        where = packing.unpack(metadata["indices"], packing.index_bits(size), slots)
        # Positions rise: a 0 after the first is an empty slot, outside of the vector.
        empty = (where == 0) & (jnp.arange(slots) > 0)
        return jnp.where(empty, size, where.astype(jnp.int32))


def spread(slot: jax.Array, hits: jax.Array, slots: int) -> jax.Array:
    """Ranks of the hits to send: all when they fit, else evenly spread, strictly increasing."""
    times, rest = jnp.maximum(hits, slots) // slots, jnp.maximum(hits, slots) % slots
    # int32 products would overflow; float32 ones are monotone, which is all that is needed.
    extra = slot.astype(jnp.float32) * (rest.astype(jnp.float32) / slots)
    return slot * times + jnp.floor(extra).astype(jnp.int32)


def threshold_top_k(fraction: float, *, sample: float = 0.01) -> ThresholdTopK:
    r"""Keeps what exceeds a threshold estimated on a sample, in at most ceil(fraction * d) slots.

    The cheap form of `top_k` for long vectors. The number of hits is random (some 12 % off with
    the smallest sample): with fewer than k hits these are exactly the largest coordinates and the
    other slots travel empty; with more, an even share of them is sent. There is no worst-case
    contraction constant: it depends on how well the sample represents the vector. Under `compose`
    the empty slots are zeros that decode to nothing, but that a quantizer's scale takes in: a mean
    magnitude (`sign`, one bit) is that much smaller.

    Args:
      fraction: Slots and expected hits per coordinate; in (0, 1].
      sample: Share of the vector in the sample; at least 64 / fraction values are taken.

    Returns:
      A compressor of as many bytes as `top_k(fraction)`. A key makes the sample start at random;
      without one it starts at the first coordinate.

    Raises:
      ValueError: If `fraction` or `sample` is not in (0, 1].

    Example:
      >>> import jaxcomm.compressors as compressors
      >>> compressors.threshold_top_k(0.01).payload_bytes(10_000)
      575

    References:
      Lin et al., Deep Gradient Compression, arXiv 1712.01887.
    """
    check_fraction_or_k("threshold_top_k", fraction, None)
    if not 0.0 < sample <= 1.0:
        raise ValueError(f"threshold_top_k: sample must be in (0, 1], got {sample}")
    return ThresholdTopK(fraction, sample)
