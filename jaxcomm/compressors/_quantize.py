"""Uniform quantization in blocks: codes of 1 to 8 bits and one scale a block.

With L = 2^bits codes, a = max|x|, m = min x and R = max x - m of a block:

  symmetric, nearest     step = -sgn(x_j) a / 2^(bits-1) at the largest |x_j|, so that x_j itself
                         is exact and zero is on the grid (one bit: +-mean|x|)
  symmetric, stochastic  step = a / (2^(bits-1) - 1), zero on the grid (one bit: +-a)
  symmetric, shift       step = 2a / (L - 1)
  minmax                 step = R / (L - 1), offset m; with learned levels q: m + R q_code

  nearest:     code = round(v)
  stochastic:  code = floor(v + u), u ~ U[0, 1) for each coordinate:       E = v
  shift:       code = floor(v + w), decoded as code - w + 1/2, w ~ U[0, 1) shared by all workers
               and coordinates: E = v, and the error is uniform, variance step^2 / 12, for every v

Sources: Wang et al., ZeRO++, arXiv 2306.10209 (block quantizer); Markov et al., QSDP,
arXiv 2302.02390 (random shift lattice, learned levels); Alistarh et al., QSGD, arXiv 1610.02132.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _noise, packing
from jaxcomm.compressors._blocks import (
    check_block_size,
    expand,
    inverse,
    largest,
    reduce_blocks,
    true_counts,
    widest,
)
from jaxcomm.compressors.base import Compressor, Payload, require_key, require_whole


@dataclasses.dataclass(frozen=True)
class Quantize(Compressor):
    """See `quantize`."""

    bits: int
    block_size: int | None
    rounding: str
    scheme: str
    levels: tuple[float, ...] | None

    @property
    def shared_key(self) -> bool:
        return self.rounding == "shift"

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        step, offset = self._grid(x)
        to_all = lambda part: expand(part, x.shape[0], self.block_size)
        v = x if offset is None else x - to_all(offset)
        shift, noise = self._draw(x.shape[0], key)
        codes = self._code(v * to_all(inverse(step)), noise)
        parts = {"scale": step, "offset": offset, "shift": shift}
        kept = {name: part for name, part in parts.items() if part is not None}
        return {"values": packing.pack(codes, self.bits), **kept}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        codes = packing.unpack(payload["values"], self.bits, size)
        to_all = lambda part: expand(part, size, self.block_size)
        value = self._value(codes, payload.get("shift")) * to_all(payload["scale"])
        return value + to_all(payload["offset"]) if "offset" in payload else value

    def encode_chunks(
        self, chunks: jax.Array, key: jax.Array | None = None, size: int | None = None
    ) -> Payload:
        """As every codec; a mean magnitude leaves padding out."""
        payload = super().encode_chunks(chunks, key, size)
        if self._by_mean and size is not None:
            counts = [true_counts(chunks.shape, self.block_size, s) for s in (chunks.size, size)]
            payload["scale"] *= counts[0] / jnp.maximum(counts[1], 1)
        return payload

    @property
    def _by_mean(self) -> bool:
        """Whether a scale is a mean magnitude, not a maximum."""
        return self.bits == 1 and self.rounding == "nearest" and self.scheme == "symmetric"

    def alpha(self, size: int) -> float | None:
        """Nearest rounding: the worst case over all vectors, None where there is none."""
        if self.rounding != "nearest":
            return None
        block, top = widest(size, self.block_size), 2**self.bits - 1
        if self.scheme == "minmax":
            error = self._widest_gap() / 2 if self.levels else 0.5 / top
            worst = 2 * block * error**2
            return 1.0 - worst if worst < 1.0 else None
        if self.bits == 1:
            return 1.0 / block
        # Others than the largest, a: just under half a step (lost whole), or just under a with
        # the other sign (clipped by one step).
        lost = (block - 1) / 4.0**self.bits
        clipped = (block - 1) / block * 4.0 ** (1 - self.bits)
        return 1.0 - max(lost / (1 + lost), clipped)

    def omega(self, size: int) -> float | None:
        """Random rounding: the worst case over all vectors."""
        if self.rounding == "nearest":
            return None
        block, top = widest(size, self.block_size), 2**self.bits - 1
        minmax = self.scheme == "minmax"
        if self.rounding == "shift":
            return block / (6.0 if minmax else 3.0) / top**2
        if minmax:
            return max(block - 2, 0) / (2.0 * top**2)
        half = self._zero()
        rough = (block - 1) / (4.0 * half**2)
        return rough if self.bits == 1 else min(rough, math.sqrt(block) / half)

    def _zero(self) -> float:
        """The (half-)code of zero on a symmetric grid."""
        top = 2**self.bits - 1
        if self.bits == 1 or self.rounding == "shift":
            return top / 2
        return float(2 ** (self.bits - 1) - (self.rounding == "stochastic"))

    def _grid(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Step and (minmax only) offset of each block."""
        of_blocks = lambda fn: reduce_blocks(fn, x, self.block_size)
        if self.scheme == "symmetric" and self.rounding != "nearest":
            return largest(x, self.block_size) * (1.0 / self._zero()), None
        if self._by_mean:
            return of_blocks(lambda rows: jnp.abs(rows).mean(1)) * 2.0, None
        low, high = of_blocks(lambda rows: rows.min(1)), of_blocks(lambda rows: rows.max(1))
        if self.scheme == "symmetric":
            return jnp.where(high >= -low, -high, -low) * (1.0 / self._zero()), None
        return (high - low) * (1.0 if self.levels else 1.0 / (2**self.bits - 1)), low

    def _draw(self, size: int, key: jax.Array | None):
        """The shared shift, (1,), if any, and the noise to add in front of floor."""
        if self.rounding == "nearest":
            return None, None
        key = require_key(key, f"quantize(rounding={self.rounding!r})")
        if self.rounding == "stochastic":
            return None, _noise.uniform(key, size)
        shift = jax.random.uniform(key, (1,), jnp.float32)
        return shift, shift

    def _code(self, v: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Codes of values in steps from the offset."""
        if self.levels:
            middles = [(a + b) / 2 for a, b in itertools.pairwise(self.levels)]
            code = jnp.searchsorted(jnp.asarray(middles, v.dtype), v, method="compare_all")
            return code.astype(jnp.uint8)
        top = 2.0**self.bits - 1
        if self.scheme == "symmetric":
            v = v + self._zero()
        if noise is not None:
            return jnp.clip(_noise.rounded(v, noise), 0, top).astype(jnp.int32).astype(jnp.uint8)
        # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits: half the
        # time of round and convert on CPU.
        near = jnp.clip(v, 0, top) + jnp.float32(1.5 * 2**23)
        return jax.lax.bitcast_convert_type(near, jnp.uint32).astype(jnp.uint8)

    def _value(self, codes: jax.Array, shift: jax.Array | None) -> jax.Array:
        """Steps from the offset that codes stand for."""
        if self.levels:
            return jnp.asarray(self.levels, jnp.float32)[codes]
        value = codes.astype(jnp.int32).astype(jnp.float32)
        if self.scheme == "symmetric":
            value = value - self._zero()
        return value if shift is None else value + (0.5 - shift)

    def _widest_gap(self) -> float:
        """Twice the largest distance of a point of [0, 1] from its nearest level."""
        assert self.levels
        inner = [b - a for a, b in itertools.pairwise(self.levels)]
        return max([2 * self.levels[0], 2 * (1 - self.levels[-1]), *inner])


def quantize(
    bits: int = 8,
    block_size: int | None = 256,
    *,
    rounding: str = "nearest",
    scheme: str = "symmetric",
    levels: tuple[float, ...] | None = None,
) -> Quantize:
    r"""Uniform quantization to `bits` bits with one float32 scale a block (min-max: two).

    .. math:: \hat x_j = s\,(q_j - z) \;\text{(symmetric)},\qquad
      \hat x_j = \min x + s\,q_j \;\text{(minmax)},\qquad q_j \in \{0, \dots, 2^{bits}-1\}

    Symmetric grids with nearest or stochastic rounding hold zero exactly (2 bits or more).
    Nearest rounding is deterministic with a contraction constant `alpha`; for minmax it is None
    (no worst-case bound) when blocks are long for the bits. Stochastic and shift rounding are
    unbiased with `omega`. All constants are worst cases over all vectors; typical errors are far
    smaller (Gaussian blocks of 256 at 4 bits: some 1 % of the norm squared).

    Args:
      bits: 1 to 8.
      block_size: Coordinates a scale; None for one scale in all.
      rounding: `nearest`; `stochastic` (a draw for each coordinate); or `shift`, QSDP's lattice
        under one random shift, which all workers must share (`shared_key` is then True).
      scheme: `symmetric` (scale from max|x|) or `minmax` (scale and offset from the range).
      levels: 2^bits increasing levels in [0, 1] of the normalised range instead of uniform ones,
        see `learn_levels`; needs nearest rounding and the minmax scheme.

    Returns:
      A compressor of ceil(d bits / 8) bytes plus 4 (symmetric) or 8 (minmax) a block, and 4 once
      for a shift.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> compressors.quantize(4).roundtrip(jnp.array([1.0, 8.0, -4.2])).tolist()
      [1.0, 8.0, -4.0]

    References:
      Wang et al., ZeRO++, arXiv 2306.10209; Markov et al., QSDP, arXiv 2302.02390.
    """
    bits = require_whole("quantize: bits", bits, 1, 8)
    block_size = check_block_size("quantize", block_size)
    if rounding not in ("nearest", "stochastic", "shift"):
        raise ValueError(
            f"quantize: rounding must be 'nearest', 'stochastic' or 'shift', got {rounding!r}"
        )
    if scheme not in ("symmetric", "minmax"):
        raise ValueError(f"quantize: scheme must be 'symmetric' or 'minmax', got {scheme!r}")
    if levels is not None:
        levels = tuple(float(q) for q in levels)
        _check_levels(levels, bits, rounding, scheme)
    return Quantize(bits, block_size, rounding, scheme, levels)


def _check_levels(levels: tuple[float, ...], bits: int, rounding: str, scheme: str) -> None:
    if rounding != "nearest" or scheme != "minmax":
        raise ValueError(
            "quantize: levels need rounding='nearest' and scheme='minmax', "
            f"got {rounding=} and {scheme=}"
        )
    rising = all(a < b for a, b in itertools.pairwise(levels))
    if len(levels) != 2**bits or not rising or levels[0] < 0 or levels[-1] > 1:
        raise ValueError(
            f"quantize: levels must be {2**bits} increasing numbers in [0, 1], got {levels}"
        )
