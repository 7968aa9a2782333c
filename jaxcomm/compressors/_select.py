"""Finding the largest magnitudes without sorting; ties go to the lowest position.

Rows: the best of each group of 16 is kept; k times over, the best group gives up its best and is
searched again. Whole vectors: the k-th magnitude is found bit by bit (31 counting passes over the
bit patterns, which order as the magnitudes do), then the positions of what reaches it are found by
descending a tree of bit counts. XLA's own top_k sorts: some 8 ns a coordinate on CPU.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.compressors import packing

PIECE = 131_072  # coordinates that the CPU searches at a time: 512 kB


def largest(x: jax.Array, k: int) -> jax.Array:
    """int32 positions of the k largest magnitudes of a vector, or of each row of a matrix.

    In no particular order; (k,) or (n, k).
    """
    return largest_of_blocks(x.reshape(-1), x.shape[1], k) if x.ndim == 2 else _in_vector(x, k)


def largest_of_blocks(x: jax.Array, b: int, k: int) -> jax.Array:
    """`largest` of the rows that the whole blocks of b elements of a vector make.

    On CPU so many rows at a time that the k passes find them in the cache, without a copy of x.
    """
    n, rows = x.shape[0] // b, max(1, PIECE // b)
    if n <= rows or jax.default_backend() != "cpu":
        return _in_rows(x[: n * b].reshape(n, b), k)

    def step(i, found):
        start = jnp.minimum(i * rows, n - rows)  # the last piece may repeat rows of the one before
        piece = lax.dynamic_slice_in_dim(x, start * b, rows * b).reshape(rows, b)
        return lax.dynamic_update_slice_in_dim(found, _in_rows(piece, k), start, 0)

    zero = lax.bitcast_convert_type(x[0], jnp.int32) & 0  # varies over axes as x does
    return lax.fori_loop(0, -(-n // rows), step, jnp.full((n, k), zero))


def _in_rows(x: jax.Array, k: int) -> jax.Array:
    b = x.shape[1]
    group = 16 if b <= 2048 else 32
    if k * (-(-b // group) + group) > 5 * b:  # measured: beyond this lax.top_k is as fast
        return lax.top_k(jnp.abs(x), k)[1].astype(jnp.int32)
    return _by_groups(x, k, group)


def _by_groups(x: jax.Array, k: int, group: int) -> jax.Array:
    n, b = x.shape
    if b % group:  # zeros at the end lose every tie: they are never taken before all else is
        x = jnp.pad(x, ((0, 0), (0, -b % group)))
    x = x.reshape(n, -1, group)
    # NaN counts as largest. XLA's maximum over rows loses it on CPU, a sum of squares does not.
    size = lambda v, nan: jnp.where(jnp.isnan(nan), jnp.inf, jnp.abs(v))
    tops = size(jnp.abs(x).max(2), (x * x).sum(2))
    # Positions are floats (exact below 2^24): XLA reduces floats far faster than integers on CPU.
    groups, places = jnp.arange(tops.shape[1]) * 1.0, jnp.arange(group) * 1.0
    bit = jnp.arange(group, dtype=jnp.uint32)

    def step(state, _):
        tops, taken = state
        best = tops.max(1, keepdims=True)
        first = jnp.where(tops == best, groups, jnp.inf).min(1, keepdims=True)
        at = first.astype(jnp.int32)
        row = jnp.take_along_axis(x, at[:, :, None], axis=1)[:, 0]
        row = size(row, row)
        gone = (jnp.take_along_axis(taken, at, axis=1) >> bit) & 1
        row = jnp.where(gone == 1, -1.0, row)
        place = jnp.where(row == best, places, jnp.inf).min(1, keepdims=True)
        rest = jnp.where(places == place, -1.0, row).max(1, keepdims=True)
        here, mark = groups == first, jnp.uint32(1) << place.astype(jnp.uint32)
        state = jnp.where(here, rest, tops), jnp.where(here, taken | mark, taken)
        return state, (at * group + place.astype(jnp.int32))[:, 0]

    nothing = jnp.zeros_like(tops, jnp.uint32) | (tops < -1.0)  # varies over axes as `tops` does
    return lax.scan(step, (tops, nothing), None, length=k)[1].T


def _in_vector(x: jax.Array, k: int) -> jax.Array:
    if k == 0 or x.shape[0] <= 4096:
        return lax.top_k(jnp.abs(x), k)[1].astype(jnp.int32)
    pattern = magnitude_bits(x)
    kth = kth_largest(pattern, k)
    above, equal = mask_words(pattern > kth), mask_words(pattern == kth)
    slot, many = jnp.arange(k, dtype=jnp.int32), count(above)
    return jnp.where(slot < many, positions_of(above, slot), positions_of(equal, slot - many))


def magnitude_bits(x: jax.Array) -> jax.Array:
    """uint32 patterns that order as |x| does, NaN above infinity."""
    return lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF


def kth_largest(pattern: jax.Array, k: int) -> jax.Array:
    """The k-th largest of uint32 patterns below 2^31, 1 <= k <= their number."""

    def step(i, kth):
        higher = kth | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(count(packing.pack(pattern >= higher, 1)) >= k, higher, kth)

    return lax.fori_loop(0, 31, step, pattern[0] & 0)  # varies over axes as the pattern does


def count(bits: jax.Array) -> jax.Array:
    """Set bits in bytes or words, int32."""
    return lax.population_count(bits).astype(jnp.int32).sum()


def mask_words(mask: jax.Array) -> jax.Array:
    """The mask as bits, little-endian, in uint32 words; their number is a power of two."""
    data = packing.pack(mask, 1)
    data = jnp.pad(data, (0, -data.shape[0] % 4))
    words = lax.bitcast_convert_type(data.reshape(-1, 4), jnp.uint32)
    return jnp.pad(words, (0, (1 << packing.index_bits(words.shape[0])) - words.shape[0]))


def positions_of(words: jax.Array, rank: jax.Array) -> jax.Array:
    """int32 positions of the set bits of these ranks (0 is the first); else meaningless."""
    levels = [lax.population_count(words).astype(jnp.int32)]
    while levels[-1].shape[0] > 2:
        levels.append(levels[-1].reshape(-1, 2).sum(1))
    node = jnp.zeros_like(rank)
    for counts in reversed(levels):
        node = node * 2
        left = counts[node]
        right = rank >= left
        rank, node = jnp.where(right, rank - left, rank), node + right
    return node * 32 + _select_bit(words[node], rank)


def _select_bit(word: jax.Array, rank: jax.Array) -> jax.Array:
    """Position of the set bit of this rank in a uint32, by halving."""
    position = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << half) - 1)
        below = lax.population_count(low).astype(jnp.int32)
        up = rank >= below
        rank = jnp.where(up, rank - below, rank)
        word = jnp.where(up, word >> half, low)
        position = position + jnp.where(up, half, 0)
    return position
