"""Natural compression and natural dithering: stochastic rounding to powers of two.

|v| = (1 + m) 2^e goes up to 2^(e+1) with probability m, down to 2^e otherwise: E C(v) = v. On the
bit pattern of a float32 that is one addition of 23 random bits whose carry lands in the exponent.
Source: Horvath et al., Natural compression for distributed deep learning, arXiv 1905.10988.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.compressors import _noise, packing
from jaxcomm.compressors._blocks import check_block_size, expand, inverse, norms, widest
from jaxcomm.compressors._qsgd import check_levels_and_norm
from jaxcomm.compressors.base import Compressor, Payload, require_key

_MANTISSA = 0x7FFFFF


@dataclasses.dataclass(frozen=True)
class Natural(Compressor):
    """See `natural`."""

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        pattern = lax.bitcast_convert_type(x, jnp.uint32)
        random = _noise.bits(require_key(key, "natural"), x.shape[0])
        exponent = round_exponent(pattern, random)
        # The largest finite exponent does not carry into the pattern of infinity.
        exponent = jnp.where((pattern >> 23) & 0xFF < 255, jnp.minimum(exponent, 254), exponent)
        signs = packing.pack((pattern >> 31).astype(jnp.uint8), 1)
        return {"values": jnp.concatenate([exponent.astype(jnp.uint8), signs])}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        exponent = payload["values"][:size].astype(jnp.uint32)
        sign = packing.unpack(payload["values"][size:], 1, size)
        return lax.bitcast_convert_type((sign << 31) | (exponent << 23), jnp.float32)

    def omega(self, size: int) -> float:
        """1/8, reached at |v| = 1.5 (up to scaling by a power of two)."""
        return 0.125


@dataclasses.dataclass(frozen=True)
class NaturalDithering(Compressor):
    """See `natural_dithering`."""

    levels: int
    block_size: int | None
    norm: str

    @property
    def bits(self) -> int:
        return (2 * self.levels).bit_length()

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        random = _noise.bits(require_key(key, "natural_dithering"), x.shape[0])
        norm = norms(x, self.block_size, self.norm)
        codes = self._code(x * expand(inverse(norm), x.shape[0], self.block_size), random)
        return {"values": packing.pack(codes, self.bits), "scale": norm}

    def _code(self, v: jax.Array, random: jax.Array) -> jax.Array:
        """Level 0 is zero, level j is 2^(j - s); negative values count down from s."""
        s, size = self.levels, jnp.abs(v)
        level = round_exponent(lax.bitcast_convert_type(size, jnp.uint32), random) - (127 - s)
        uniform = (random >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24
        level = jnp.where(size >= 2.0 ** (1 - s), level, uniform < size * 2.0 ** (s - 1))
        level = jnp.minimum(level, s)
        return jnp.where(v < 0, s - level, s + level)

    def decode(self, payload: Payload, size: int) -> jax.Array:
        codes = packing.unpack(payload["values"], self.bits, size).astype(jnp.int32)
        level = codes - self.levels
        exponent = (jnp.abs(level) + (127 - self.levels)).astype(jnp.uint32)
        power = lax.bitcast_convert_type(exponent << 23, jnp.float32)
        values = jnp.where(level == 0, 0.0, jnp.where(level < 0, -power, power))
        return values * expand(payload["scale"], size, self.block_size)

    def omega(self, size: int) -> float:
        """1/8 + sqrt(d) t min(1, sqrt(d) t), t = 2^(1-s) the smallest level, d the block."""
        root = math.sqrt(widest(size, self.block_size)) * 2.0 ** (1 - self.levels)
        return 0.125 + root * min(1.0, root)


def round_exponent(pattern: jax.Array, random: jax.Array) -> jax.Array:
    """Biased exponent of float32 bit patterns after natural rounding with these random bits."""
    return (((pattern & 0x7FFFFFFF) + (random & _MANTISSA)) >> 23).astype(jnp.uint32)


def natural() -> Natural:
    r"""Natural compression: every coordinate becomes one of its two neighbouring powers of two.

    .. math:: C(v) = \mathrm{sgn}(v)\,2^{\lfloor\log_2|v|\rfloor + b},\quad
      P(b = 1) = |v| / 2^{\lfloor\log_2|v|\rfloor} - 1,\qquad E\,C(v) = v,\quad \omega = 1/8

    Sign and exponent travel: 9 bits a coordinate, no scale. Magnitudes below 2^-126 are rounded to
    0 or 2^-126; a value above 2^127 never becomes infinite.

    Returns:
      A random, unbiased compressor; encode needs a key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.natural().roundtrip(jnp.array([-4.0, 0.0]), jax.random.key(0)).tolist()
      [-4.0, 0.0]

    References:
      Horvath et al., Natural Compression for Distributed Deep Learning, arXiv 1905.10988.
    """
    return Natural()


def natural_dithering(
    levels: int = 7, block_size: int | None = 512, *, norm: str = "l2"
) -> NaturalDithering:
    r"""Dithering to powers of two of the norm: QSGD with levels 0, 2^(1-s), ..., 1/2, 1.

    .. math:: \omega = 1/8 + \sqrt d\,2^{1-s}\min(1, \sqrt d\,2^{1-s}),\qquad E\,C(v) = v

    with d the block: many fewer levels than QSGD for the same variance.

    Args:
      levels: Levels s above zero, 1 to 100; ceil(log2(2 s + 1)) bits a coordinate (7: 4 bits).
      block_size: Coordinates a norm; None for one in all.
      norm: `l2` or `max`.

    Returns:
      A random, unbiased compressor; encode needs a key.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> import jaxcomm.compressors as compressors
      >>> compressors.natural_dithering(7).payload_bytes(1024)
      520

    References:
      Horvath et al., Natural Compression for Distributed Deep Learning, arXiv 1905.10988.
    """
    levels = check_levels_and_norm("natural_dithering", levels, norm, 100)
    return NaturalDithering(levels, check_block_size("natural_dithering", block_size), norm)
