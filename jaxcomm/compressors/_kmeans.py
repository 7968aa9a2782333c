"""A codebook of k values found by Lloyd's iterations: FedZip's clustering quantizer.

Centroids start at linspace(min, max, k), the one nearest to zero is pinned at zero. Then, some
times over: every value to its nearest centroid, every other centroid to the mean of its values (one
without values stays). The distortion never increases, and zeros stay zeros.
Source: Malekijoo et al., FedZip, arXiv 2102.01593.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import packing
from jaxcomm.compressors.base import Compressor, Payload, require_whole


@dataclasses.dataclass(frozen=True)
class KMeans(Compressor):
    """See `kmeans`."""

    k: int
    iterations: int
    pin_zero: bool

    @property
    def bits(self) -> int:
        return packing.index_bits(self.k)

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        del key
        codebook = self._start(x)
        for _ in range(self.iterations):
            codebook = self._lloyd(x, codebook)
        return {"values": packing.pack(nearest(x, codebook), self.bits), "codebook": codebook}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        codes = packing.unpack(payload["values"], self.bits, size)
        codebook, value = payload["codebook"], jnp.zeros((size,), jnp.float32)
        if self.k > 16:
            return codebook[codes]
        for j in range(self.k):  # selects vectorize where a gather does not
            value = jnp.where(codes == j, codebook[j], value)
        return value

    def alpha(self, size: int) -> float | None:
        """1/d with zero pinned: the largest coordinate starts exact, the rest never exceed v."""
        return 1.0 / max(size, 1) if self.pin_zero and self.k > 1 else None

    def _start(self, x: jax.Array) -> jax.Array:
        low = x.min() if x.shape[0] else jnp.float32(0)
        high = x.max() if x.shape[0] else jnp.float32(0)
        codebook = low + (high - low) * jnp.linspace(0.0, 1.0, self.k, dtype=jnp.float32)
        codebook = jnp.where(jnp.arange(self.k) == self.k - 1, high, codebook)
        if not self.pin_zero:
            return codebook
        pinned = jnp.arange(self.k) == jnp.argmin(jnp.abs(codebook))
        return jnp.sort(jnp.where(pinned, 0.0, codebook))  # equal values may change places

    def _lloyd(self, x: jax.Array, codebook: jax.Array) -> jax.Array:
        codes = nearest(x, codebook)

        def total(j):
            mine = codes == j
            return jnp.where(mine, x, 0.0).sum(), mine.astype(jnp.float32).sum()

        sums, counts = jax.lax.map(total, jnp.arange(self.k, dtype=jnp.uint8))
        moved = jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), codebook)
        return jnp.where(codebook == 0, 0.0, moved) if self.pin_zero else moved


def nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """uint8 position of the nearest entry of an increasing codebook."""
    middles = (codebook[1:] + codebook[:-1]) * 0.5
    return jnp.searchsorted(middles, x, method="compare_all").astype(jnp.uint8)


def kmeans(k: int = 3, iterations: int = 4, *, pin_zero: bool = True) -> KMeans:
    r"""Replaces every coordinate by the nearest of k centroids fitted to the vector.

    With zero pinned the error never exceeds that of sending nothing, and exact zeros (of a
    sparsified vector) stay exact zeros; :math:`\alpha = 1/d` in the worst case, far better on data.

    Args:
      k: Centroids, 2 to 256; 3 is FedZip's.
      iterations: Lloyd iterations.
      pin_zero: Keep the centroid nearest to zero at zero. Without it there is no `alpha`.

    Returns:
      A deterministic compressor of ceil(d ceil(log2 k) / 8) + 4 k bytes; `entropy` codes its
      symbols shorter for storage and upload.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.kmeans(3).roundtrip(jnp.array([-2.0, 0.0, 3.0, 5.0])).tolist()
      [-2.0, 0.0, 4.0, 4.0]

    References:
      Malekijoo et al., FedZip, arXiv 2102.01593.
    """
    k = require_whole("kmeans: k", k, 2, 256)
    return KMeans(k, require_whole("kmeans: iterations", iterations, 0), pin_zero)
