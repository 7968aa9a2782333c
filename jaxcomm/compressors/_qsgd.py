"""QSGD: stochastic rounding to s uniform levels of the norm.

Q(v)_j = ||v|| sgn(v_j) xi_j / s, xi_j = floor(s |v_j| / ||v||) or one more, so that E Q(v) = v.
Source: Alistarh et al., QSGD, arXiv 1610.02132.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _noise, packing
from jaxcomm.compressors._blocks import check_block_size, expand, inverse, norms, widest
from jaxcomm.compressors.base import Compressor, Payload, require_key, require_whole


@dataclasses.dataclass(frozen=True)
class Qsgd(Compressor):
    """See `qsgd`."""

    levels: int
    block_size: int | None
    norm: str

    @property
    def bits(self) -> int:
        return (2 * self.levels).bit_length()

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        noise = _noise.uniform(require_key(key, "qsgd"), x.shape[0])
        norm = norms(x, self.block_size, self.norm)
        v = x * expand(inverse(norm) * self.levels, x.shape[0], self.block_size)
        # Rounding a signed v is the rule for |v| with its sign put back.
        codes = _noise.rounded(v, noise) + self.levels
        codes = jnp.clip(codes, 0, 2 * self.levels).astype(jnp.int32)
        return {"values": packing.pack(codes, self.bits), "scale": norm}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        codes = packing.unpack(payload["values"], self.bits, size).astype(jnp.int32) - self.levels
        step = payload["scale"] * (1.0 / self.levels)
        return codes.astype(jnp.float32) * expand(step, size, self.block_size)

    def omega(self, size: int) -> float:
        """min(d/s^2, sqrt(d)/s) of a block; with the max norm (d-1)/(4 s^2) for the first."""
        d, s = widest(size, self.block_size), self.levels
        return min(d / s**2 if self.norm == "l2" else (d - 1) / (4 * s**2), math.sqrt(d) / s)


def check_levels_and_norm(name: str, levels: int, norm: str, most: int) -> int:
    """`levels` as an int from 1 to `most`."""
    if norm not in ("l2", "max"):
        raise ValueError(f"{name}: norm must be 'l2' or 'max', got {norm!r}")
    return require_whole(f"{name}: levels", levels, 1, most)


def qsgd(levels: int = 127, block_size: int | None = 512, *, norm: str = "l2") -> Qsgd:
    r"""QSGD: unbiased stochastic rounding to `levels` levels of each block's norm.

    .. math:: Q(v)_j = \|v\|\,\mathrm{sgn}(v_j)\,\xi_j / s,\qquad
      E\,Q(v) = v,\qquad \omega = \min(d/s^2, \sqrt d / s)

    with d the block. Codes are packed at fixed width, ceil(log2(2 s + 1)) bits with the sign:
    s = 7 gives 4 bits, s = 127 gives 8.

    Args:
      levels: Levels s above zero, 1 to 32,767.
      block_size: Coordinates a norm; None for one in all.
      norm: `l2` (the paper's analysis) or `max` (its experiments; smaller error in practice).

    Returns:
      A random, unbiased compressor; encode needs a key.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.qsgd(7).payload_bytes(1024)
      520

    References:
      Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding,
      arXiv 1610.02132.
    """
    levels = check_levels_and_norm("qsgd", levels, norm, 32_767)
    return Qsgd(levels, check_block_size("qsgd", block_size), norm)
