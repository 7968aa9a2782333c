"""One bit a coordinate and a scale: C(v) = s sgn(v), with sgn(0) = +1.

  l1:  s = ||v||_1 / d        always contractive: error ratio 1 - ||v||_1^2 / (d ||v||_2^2)
  l2:  s = ||v||_2 / sqrt(d)  1-bit Adam's; error ratio 2 (1 - ||v||_1 / (sqrt(d) ||v||_2)),
                              expansive on sparse vectors
Sources: Seide et al., 1-bit stochastic gradient descent, 2014; Karimireddy et al., Error feedback
fixes signSGD, arXiv 1901.09847; Tang et al., 1-bit Adam, arXiv 2102.02888 (l2).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import packing
from jaxcomm.compressors._blocks import (
    check_block_size,
    expand,
    norms,
    reduce_blocks,
    true_counts,
)
from jaxcomm.compressors.base import Compressor, Payload


@dataclasses.dataclass(frozen=True)
class Sign(Compressor):
    """See `sign`."""

    scale: str = "l1"
    block_size: int | None = None

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        del key
        counts = true_counts((1, x.shape[0]), self.block_size, x.shape[0])[0]
        return {"values": _sign_bits(x), "scale": self._scales(x, counts)}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        negative = packing.unpack(payload["values"], 1, size)
        scale = expand(payload["scale"], size, self.block_size)
        return jnp.where(negative == 1, -scale, scale)

    def encode_chunks(
        self, chunks: jax.Array, key: jax.Array | None = None, size: int | None = None
    ) -> Payload:
        """Rows of one vector. Without blocks all share its one scale (1-bit Adam's rule)."""
        del key
        n, c = chunks.shape
        size = n * c if size is None else size
        bits = jax.vmap(_sign_bits)(chunks)
        if self.block_size is None:
            one = self._scales(chunks.reshape(-1), jnp.full((1,), size))
            return {"values": bits, "scale": jnp.broadcast_to(one, (n, 1))}
        counts = true_counts(chunks.shape, self.block_size, size)
        return {"values": bits, "scale": jax.vmap(self._scales)(chunks, counts)}

    def alpha(self, size: int) -> float | None:
        """1/d for l1 (tight for one non-zero coordinate); None for l2, which can expand."""
        if self.scale == "l2":
            return None
        return 1.0 / max(min(self.block_size or size, size), 1)

    def _scales(self, x: jax.Array, counts: jax.Array) -> jax.Array:
        """One scale a block; padding is zero and must not be in `counts`."""
        counts = jnp.maximum(counts, 1).astype(jnp.float32)
        if self.scale == "l2":
            some = self.block_size is not None or x.shape[0]
            total = norms(x, self.block_size, "l2") if some else jnp.zeros((1,), jnp.float32)
            return total / jnp.sqrt(counts)
        if self.block_size is None:
            return jnp.abs(x).sum(keepdims=True) / counts
        return reduce_blocks(lambda rows: jnp.abs(rows).sum(1), x, self.block_size) / counts


def _sign_bits(x: jax.Array) -> jax.Array:
    """Bit 1 where x < 0; -0.0 and 0.0 both count as positive."""
    return packing.pack((x < 0).astype(jnp.uint8), 1)


def sign(scale: str = "l1", block_size: int | None = None) -> Sign:
    r"""One bit a coordinate, and one float32 scale for the vector or for each block.

    .. math:: C(v) = s\,\mathrm{sgn}(v),\quad s = \|v\|_1/d \;\text{(l1)},\;
      \|v\|_2/\sqrt d \;\text{(l2)},\quad \mathrm{sgn}(0) = +1

    An all-zero vector (or block) has scale 0 and decodes to exact zeros. With `l1` the error is
    :math:`(1 - \|v\|_1^2 / (d\|v\|_2^2))\|v\|^2`, some 0.363 on Gaussian vectors, with worst case
    :math:`\alpha = 1/d`. `l2` keeps the norm but doubles the error of sparse vectors: it has no
    contraction constant.

    Args:
      scale: `l1` or `l2`.
      block_size: Coordinates a scale; None for one scale in all.

    Returns:
      A compressor of ceil(d / 8) bytes plus 4 a scale.

    Raises:
      ValueError: If `scale` is neither, or `block_size` is below 1.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.sign().roundtrip(jnp.array([3.0, -1.0])).tolist()
      [2.0, -2.0]

    References:
      Karimireddy et al., Error Feedback Fixes SignSGD, arXiv 1901.09847;
      Tang et al., 1-bit Adam, arXiv 2102.02888.
    """
    if scale not in ("l1", "l2"):
        raise ValueError(f"sign: scale must be 'l1' or 'l2', got {scale!r}")
    return Sign(scale, check_block_size("sign", block_size))
