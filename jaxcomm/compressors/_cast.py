"""Narrow floats: bfloat16, float16 and the two float8 formats, bitcast to integers on the wire.

XLA on CPU widens narrow float collectives (bfloat16 to float32, float8 to float16), so the
payload is an unsigned integer of the same width. float16 and float8 carry one power-of-two
scale that puts the largest magnitude just below the format's range: nothing overflows to
inf or NaN, small gradients do not vanish, and the scaling itself rounds nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.compressors.base import Compressor, Payload

_WIRE = {1: jnp.uint8, 2: jnp.uint16}
_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_SHORT = {"bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True)
class Cast(Compressor):
    """See `cast`."""

    dtype: str
    scaled: bool

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        del key
        narrow = jnp.dtype(self.dtype)
        wire = _WIRE[narrow.itemsize]
        if not self.scaled:
            return {"values": lax.bitcast_convert_type(x.astype(narrow), wire)}
        exponent = _scale_exponent(x, int(jnp.finfo(narrow).maxexp) - 1)
        shrunk = x * _power_of_two(254 - exponent)
        if narrow.itemsize == 1:
            codes = _float8_bits(shrunk, jnp.finfo(narrow))
        else:
            codes = lax.bitcast_convert_type(shrunk.astype(narrow), wire)
        return {"values": codes, "scale": _power_of_two(exponent).reshape(1)}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        narrow = lax.bitcast_convert_type(payload["values"], jnp.dtype(self.dtype))
        wide = narrow.astype(jnp.float32).reshape(size)
        return wide * payload["scale"] if self.scaled else wide

    def alpha(self, size: int) -> float:
        """1 - u^2 - d t^2: unit roundoff u; t, half the smallest step over the largest value."""
        info = jnp.finfo(jnp.dtype(self.dtype))
        rounding = float(info.eps) / 2
        if not self.scaled:
            return 1.0 - rounding**2
        step = float(info.smallest_subnormal) / 2.0 ** (int(info.maxexp) - 1)
        error = rounding**2 + size * step**2
        # The largest coordinate is always coded to within u: the other bound for huge sizes.
        return max(1.0 - error, (1.0 - rounding**2) / max(size, 1))


def _float8_bits(x: jax.Array, info) -> jax.Array:
    """The bits of x.astype(a float8) for finite values in its range, by integer arithmetic.

    XLA's own conversion is scalar code on CPU, 4 times slower. Normal numbers: round the mantissa
    half to even and shift; subnormal ones: let a float32 addition round to their fixed step.
    """
    keep, bias = int(info.nmant), 1 - int(info.minexp)
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    size, drop = pattern & 0x7FFFFFFF, 23 - keep
    rounded = (size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop
    magic = jnp.float32(2.0 ** (1 - bias - keep + 23))
    to_bits = lambda v: lax.bitcast_convert_type(v, jnp.uint32)
    subnormal = to_bits(jnp.abs(x) + magic) - to_bits(magic)
    code = jnp.where(size < (128 - bias) << 23, subnormal, rounded - ((127 - bias) << keep))
    return (code | ((pattern >> 31) << 7)).astype(jnp.uint8)


def _power_of_two(biased_exponent: jax.Array) -> jax.Array:
    """2^(e - 127) in float32, 1 <= e <= 254."""
    return lax.bitcast_convert_type(biased_exponent << 23, jnp.float32)


def _scale_exponent(x: jax.Array, top: int) -> jax.Array:
    """Biased exponent of the scale under which max|x| falls into [2^(top-1), 2^top)."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    exponent = lax.bitcast_convert_type(largest, jnp.uint32) >> 23
    return jnp.maximum(exponent.astype(jnp.int32) + 1 - top, 1).astype(jnp.uint32)


def cast(dtype, *, scaled: bool | None = None) -> Cast:
    r"""Rounds every coordinate to a narrow float, to nearest even.

    With unit roundoff u (2^-8 for bfloat16, 2^-11 float16, 2^-4 e4m3, 2^-3 e5m2) the contraction
    is :math:`\alpha = 1 - u^2` minus what underflows: :math:`d\,t^2` with t the ratio of half the
    smallest step to the largest coordinate (scaled formats only). bfloat16 has float32's range but
    for its ends: beyond 3.39e38 it is infinite, below 1.2e-38 zero.

    Args:
      dtype: `bfloat16`, `float16`, `float8_e4m3fn` or `float8_e5m2`, as a dtype or its name
        (`bf16` and `fp16` also).
      scaled: Send one float32 power-of-two scale so that nothing overflows; by default True for
        all but bfloat16. Unscaled float16 and float8 overflow as the format does, and `alpha`
        then holds only for coordinates within the format's normal range.

    Returns:
      A compressor of 2 or 1 bytes a coordinate, plus 4 bytes when scaled.

    Raises:
      ValueError: For any other dtype.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.cast(jnp.bfloat16).payload_bytes(1000)
      2000
    """
    name = _SHORT.get(dtype, dtype) if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"cast: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return Cast(name, name != "bfloat16" if scaled is None else scaled)
