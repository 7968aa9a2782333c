"""E3M0, the 4-bit float of Streaming DiLoCo: a sign and three exponent bits.

Code 0 is zero, code c = 1..7 is 2^(c-3); with scale max|x| / 2^4 the seven magnitudes are
max|x| 2^-6 ... max|x|. Rounding is to the nearest in the linear domain: relative error at most 1/3
inside the range. Source: Douillard et al., Streaming DiLoCo, arXiv 2501.18512 (the format; codes
and scale are ours).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.compressors import packing
from jaxcomm.compressors._blocks import check_block_size, expand, inverse, largest, widest
from jaxcomm.compressors.base import Compressor, Payload


@dataclasses.dataclass(frozen=True)
class Fp4E3M0(Compressor):
    """See `fp4_e3m0`."""

    block_size: int | None

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        del key
        top = largest(x, self.block_size)
        codes = _code(x * expand(inverse(top), x.shape[0], self.block_size))
        return {"values": packing.pack(codes, 4), "scale": top * 2.0**-4}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        codes = packing.unpack(payload["values"], 4, size)
        exponent = codes & 7
        # 2^(c-3) has the biased exponent c + 124; the sign is bit 3 of the code.
        pattern = ((codes >> 3) << 31) | jnp.where(exponent == 0, 0, (exponent + 124) << 23)
        values = lax.bitcast_convert_type(pattern, jnp.float32)
        return values * expand(payload["scale"], size, self.block_size)

    def alpha(self, size: int) -> float:
        """8/9 unless so many coordinates fall below max|x| / 128 that they outweigh the rest."""
        lost = (widest(size, self.block_size) - 1) * 2.0**-14
        return 1.0 - max(1 / 9, lost / (1.0 + lost))


def _code(v: jax.Array) -> jax.Array:
    """4-bit codes of values in [-1, 1]."""
    pattern = lax.bitcast_convert_type(v, jnp.uint32)
    size = pattern & 0x7FFFFFFF
    # Half a power of two added to the pattern: the carry rounds at 1.5 * 2^e.
    exponent = ((size + 0x400000) >> 23).astype(jnp.int32) - 120
    smallest = (size >= 0x3C000000).astype(jnp.int32)  # |v| >= 2^-7, halfway to 2^-6
    code = jnp.clip(jnp.maximum(exponent, smallest), 0, 7)
    return (((pattern >> 31) << 3) | code.astype(jnp.uint32)).astype(jnp.uint8)


def fp4_e3m0(block_size: int | None = None) -> Fp4E3M0:
    r"""Four bits a coordinate: sign and exponent of the nearest of 0, s/64, s/32, ..., s = max|v|.

    The relative error is at most 1/3 down to s/64; what is below s/128 becomes zero. Worst-case
    contraction :math:`\alpha = 1 - \max(1/9,\, r/(1+r)),\ r = (d-1)\,2^{-14}`, d the block.

    Args:
      block_size: Coordinates a scale; None for one scale in all, as in Streaming DiLoCo.

    Returns:
      A deterministic compressor of ceil(d / 2) bytes plus 4 a scale.

    Raises:
      ValueError: If `block_size` is below 1.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.fp4_e3m0().roundtrip(jnp.array([8.0, -2.9, 0.0])).tolist()
      [8.0, -2.0, 0.0]

    References:
      Douillard et al., Streaming DiLoCo, arXiv 2501.18512.
    """
    return Fp4E3M0(check_block_size("fp4_e3m0", block_size))
