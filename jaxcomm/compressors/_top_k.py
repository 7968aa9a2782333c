"""Top-k: the k coordinates of largest magnitude, of the whole vector or of each block.

Contraction alpha = k/d, tight for equal magnitudes (Stich et al., Sparsified SGD with memory,
arXiv 1809.07599). Ties go to the lowest position, on every backend.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import packing
from jaxcomm.compressors._select import largest, largest_of_blocks
from jaxcomm.compressors.base import Payload, require_whole
from jaxcomm.compressors.sparse import Sparsifier, check_fraction_or_k, kept


@dataclasses.dataclass(frozen=True)
class TopK(Sparsifier):
    """See `top_k`."""

    fraction: float | None
    k: int | None

    def count(self, size: int) -> int:
        return kept(self.fraction, self.k, size)

    def select(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Payload]:
        del key
        where = largest(x, self.count(x.shape[0]))
        return x[where], {"indices": packing.pack(where, packing.index_bits(x.shape[0]))}

    def positions(self, metadata: Payload, size: int) -> jax.Array:
        bits = packing.index_bits(size)
        return packing.unpack(metadata["indices"], bits, self.count(size)).astype(jnp.int32)

    def alpha(self, size: int) -> float:
        """k/d."""
        return self.count(size) / size if size else 1.0


@dataclasses.dataclass(frozen=True)
class BlockTopK(Sparsifier):
    """See `block_top_k`."""

    fraction: float | None
    k: int | None
    block_size: int

    def _layout(self, size: int) -> tuple[int, int, int, int]:
        """Whole blocks, values kept in each, elements of the short last block, values kept."""
        blocks, rest = divmod(size, self.block_size)
        last = kept(self.fraction, None if self.k is None else min(self.k, rest), rest)
        return blocks, kept(self.fraction, self.k, self.block_size), rest, last

    def count(self, size: int) -> int:
        blocks, k, _, last = self._layout(size)
        return blocks * k + last

    def select(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Payload]:
        del key
        blocks, k, rest, last = self._layout(x.shape[0])
        whole, size = blocks * self.block_size, x.shape[0]
        where = jnp.zeros((0, k), jnp.int32)
        if blocks:
            where = largest_of_blocks(x, self.block_size, k)
        tail = jnp.zeros((0,), jnp.int32)
        if rest:
            tail = largest(x[None, whole:], last)[0]
        starts = jnp.arange(blocks, dtype=jnp.int32)[:, None] * self.block_size
        values = [x[(starts + where).reshape(-1)], x[whole + tail]]
        places = jnp.concatenate([where.reshape(-1), tail])
        return jnp.concatenate(values), {"indices": packing.pack(places, self._bits(size))}

    def positions(self, metadata: Payload, size: int) -> jax.Array:
        blocks, k, _, last = self._layout(size)
        within = packing.unpack(metadata["indices"], self._bits(size), self.count(size))
        starts = jnp.arange(blocks, dtype=jnp.int32)[:, None] * self.block_size
        starts = jnp.broadcast_to(starts, (blocks, k)).reshape(-1)
        start = jnp.concatenate([starts, jnp.full((last,), blocks * self.block_size, jnp.int32)])
        return start + within.astype(jnp.int32)

    def alpha(self, size: int) -> float:
        """The smallest k/d of any block."""
        blocks, k, rest, last = self._layout(size)
        whole = k / self.block_size if blocks else 1.0
        return min(whole, last / rest if rest else 1.0)

    def _bits(self, size: int) -> int:
        return packing.index_bits(min(self.block_size, size))


def top_k(fraction: float | None = None, *, k: int | None = None) -> TopK:
    r"""Keeps the k coordinates of largest magnitude; :math:`\alpha = k/d`.

    Args:
      fraction: Keep k = ceil(fraction * d) of d coordinates, at least one; in (0, 1].
      k: Or keep exactly this many. Exactly one of the two is given.

    Returns:
      A compressor of k (4 + ceil(log2 d) / 8) bytes: float32 values and packed indices.

    Raises:
      ValueError: If not exactly one is given or it is out of range; at encode and payload_bytes
        when the vector has fewer than k coordinates.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.top_k(k=1).roundtrip(jnp.array([1.0, -3.0, 2.0])).tolist()
      [0.0, -3.0, 0.0]

    References:
      Stich et al., Sparsified SGD with Memory, arXiv 1809.07599.
    """
    return TopK(fraction, check_fraction_or_k("top_k", fraction, k))


def block_top_k(
    fraction: float | None = None, *, k: int | None = None, block_size: int = 1024
) -> BlockTopK:
    r"""Keeps the k coordinates of largest magnitude of every block of `block_size`.

    Much cheaper than `top_k` (no selection over the whole vector) and with shorter indices:
    log2(block_size) bits, since a position is counted within its block. :math:`\alpha` is the
    smallest k/d over the blocks.

    Args:
      fraction: Keep ceil(fraction * block_size) of each block; in (0, 1]. A short last block
        keeps ceil(fraction * its length).
      k: Or keep this many of each block (a shorter last block keeps at most its length).
      block_size: Coordinates a block.

    Returns:
      A compressor of some k (4 + log2(block_size) / 8) bytes a block.

    Raises:
      ValueError: If not exactly one of fraction and k is given, one is out of range, or
        k exceeds block_size.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> c = compressors.block_top_k(k=1, block_size=2)
      >>> c.roundtrip(jnp.array([1.0, -3.0, 2.0, 1.0, 0.5])).tolist()
      [0.0, -3.0, 2.0, 0.0, 0.5]
    """
    k = check_fraction_or_k("block_top_k", fraction, k)
    block_size = require_whole("block_top_k: block_size", block_size, 1)
    if k is not None and k > block_size:
        raise ValueError(f"block_top_k: k must be at most block_size={block_size}, got {k}")
    return BlockTopK(fraction, k, block_size)
