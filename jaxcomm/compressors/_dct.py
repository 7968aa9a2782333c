"""Top-k of the cosine spectrum of chunks: DeMo's extraction of the fast components.

The vector is cut into chunks (the last one padded with zeros), each chunk is multiplied by the
orthonormal DCT-II matrix B_ij = sqrt((1 + [i > 0]) / n) cos(pi i (2 j + 1) / (2 n)), and the k
coefficients of largest magnitude travel. Source: Peng et al., DeMo, arXiv 2411.19870 (there on
two-dimensional blocks of matrices; here on the flat vector).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors._top_k import BlockTopK
from jaxcomm.compressors.base import Payload, require_whole
from jaxcomm.compressors.sparse import Sparsifier


@dataclasses.dataclass(frozen=True)
class DctTopK(Sparsifier):
    """See `dct_top_k`."""

    k: int
    chunk: int

    @property
    def _selector(self) -> BlockTopK:
        return BlockTopK(None, self.k, self.chunk)

    def coded_size(self, size: int) -> int:
        return -(-size // self.chunk) * self.chunk

    def count(self, size: int) -> int:
        return self._selector.count(self.coded_size(size))

    def select(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Payload]:
        padded = jnp.pad(x, (0, self.coded_size(x.shape[0]) - x.shape[0]))
        return self._selector.select(_rows_times(padded, dct_basis(self.chunk).T), key)

    def positions(self, metadata: Payload, size: int) -> jax.Array:
        return self._selector.positions(metadata, self.coded_size(size))

    def synthesize(self, coded: jax.Array, size: int) -> jax.Array:
        return _rows_times(coded, dct_basis(self.chunk))[:size]

    def alpha(self, size: int) -> float:
        """k / chunk: the transform keeps the norm."""
        del size
        return self.k / self.chunk


@functools.cache
def dct_basis(n: int) -> np.ndarray:
    """The orthonormal DCT-II matrix (n, n), float32; row i is the i-th cosine."""
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    basis = np.cos(np.pi * i * (2 * j + 1) / (2 * n)) * np.sqrt(np.where(i > 0, 2.0, 1.0) / n)
    return basis.astype(np.float32)


def _rows_times(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    rows = x.reshape(-1, matrix.shape[0])
    # Accelerators round float32 products to bfloat16 or tf32 unless told otherwise.
    return jnp.dot(rows, matrix, precision=jax.lax.Precision.HIGHEST).reshape(-1)


def dct_top_k(k: int, chunk: int = 64) -> DctTopK:
    r"""Keeps the k largest of the `chunk` DCT-II coefficients of every chunk.

    Orthonormal, so :math:`\alpha = k/\text{chunk}` as for block top-k; better than block top-k
    where neighbouring coordinates move together.

    Args:
      k: Coefficients kept of each chunk.
      chunk: Coordinates a chunk.

    Returns:
      A deterministic compressor of k (4 + log2(chunk) / 8) bytes a chunk.

    Raises:
      ValueError: If they are not whole or not 1 <= k <= chunk.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> y = compressors.dct_top_k(1, 64).roundtrip(jnp.full(64, 3.0))  # one cosine is enough
      >>> bool(jnp.allclose(y, 3.0))
      True

    References:
      Peng, Quesnelle, Kingma, DeMo: Decoupled Momentum Optimization, arXiv 2411.19870.
    """
    chunk = require_whole("dct_top_k: chunk", chunk, 1)
    return DctTopK(require_whole("dct_top_k: k", k, 1, chunk), chunk)
