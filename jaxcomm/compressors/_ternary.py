"""Three values a coordinate and a scale: C(v) = s t, with t in {-1, 0, 1}, five of them a byte.

  t_j = sgn(v_j) where |v_j| > threshold mean|v|, else 0;      s = mean of |v_j| over t_j != 0

For these t no other s is nearer to v: the error is ||v||^2 - (sum_S |v_j|)^2 / |S| over the S of
t_j != 0, at 0.7 some 0.191 ||v||^2 on Gaussian vectors (the best three values: 0.190), where the
sign has 0.363. 3^5 = 243 <= 256 gives 1.6 bits a coordinate, a fifth less than two bits.

Source: Li, Zhang and Liu, Ternary weight networks, arXiv 1605.04711 (threshold 0.7).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import packing
from jaxcomm.compressors._blocks import block_rows, check_block_size, expand, sums, widest
from jaxcomm.compressors.base import Compressor, Payload


@dataclasses.dataclass(frozen=True)
class Ternary(Compressor):
    """See `ternary`."""

    block_size: int | None = 256
    threshold: float = 0.7

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        del key
        parts = [self._code(rows) for rows in block_rows(x, self.block_size)]
        trits, scale = (jnp.concatenate(part) for part in zip(*parts))
        return {"values": packing.pack_trits(trits), "scale": scale}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        trits = packing.unpack_trits(payload["values"], size).astype(jnp.int32) - 1
        return trits.astype(jnp.float32) * expand(payload["scale"], size, self.block_size)

    def _code(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The trits + 1 of rows, flat, and the scale of each row."""
        size = jnp.abs(rows)
        floor = self.threshold * size.mean(1, keepdims=True)
        sent = size > floor
        total, count = sums(jnp.where(sent, size, 0.0), sent.astype(jnp.float32))
        trits = (rows > floor).astype(jnp.uint8) + (rows >= -floor)
        return trits.reshape(-1), total / jnp.maximum(count, 1)

    def alpha(self, size: int) -> float | None:
        """What is left out has at most d (threshold ||v||_1 / d)^2 <= threshold^2 ||v||^2."""
        return (1.0 - self.threshold**2) / widest(size, self.block_size)


def ternary(block_size: int | None = 256, threshold: float = 0.7) -> Ternary:
    r"""1.6 bits a coordinate: -s, 0 or s, with one float32 scale s a block.

    .. math:: \hat v_j = s\,\mathrm{sgn}(v_j)\,[\,|v_j| > \tau\,],\quad
      \tau = \text{threshold}\cdot\|v\|_1/d,\quad s = \mathrm{mean}\{|v_j| : |v_j| > \tau\}

    Deterministic, and a contraction for every vector: :math:`\alpha \ge (1 - threshold^2)/d`,
    typically 0.8.

    Args:
      block_size: Coordinates a scale; None for one scale in all.
      threshold: times the mean magnitude: what is not larger is sent as zero; in [0, 1).

    Returns:
      A compressor of ceil(d / 5) bytes plus 4 a block.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.ternary().roundtrip(jnp.array([3.0, 0.5, -1.0, -5.0])).tolist()
      [4.0, 0.0, 0.0, -4.0]

    References:
      Li, Zhang and Liu, Ternary Weight Networks, arXiv 1605.04711.
    """
    block_size = check_block_size("ternary", block_size)
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"ternary: threshold must be in [0, 1), got {threshold}")
    return Ternary(block_size, threshold)
