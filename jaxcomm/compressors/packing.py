"""Bit packing: unsigned integers at the width they need, as bytes, with no gaps.

A width is a sum of planes of 16, 8, 4, 2 and 1 bits (10 = 8 + 2, 7 = 4 + 2 + 1), low bits first.
Each plane of the first 8 * (count // 8) values is stored by itself, little-endian, so that packing
and unpacking are elementwise passes over aligned words, which XLA vectorizes; streams of values
that straddle words were measured 2 to 10 times slower on CPU. The up to 7 values left are one
plain bit stream. Together: exactly ceil(count * bits / 8) bytes.
"""

import jax
import jax.numpy as jnp

from jaxcomm.compressors._fence import fence

_NATIVE = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def index_bits(size: int) -> int:
    """Bits that an index into `size` elements needs (at least 1)."""
    return max(1, (size - 1).bit_length())


def pack(values: jax.Array, bits: int) -> jax.Array:
    """Packs a vector of unsigned integers < 2**bits, 1 <= bits <= 32, into uint8 bytes."""
    if bits in _NATIVE:
        return _to_bytes(values.astype(_NATIVE[bits]))
    values = values.astype(jnp.uint8 if bits < 8 else jnp.uint32)
    whole = values.shape[0] // 8 * 8
    parts = [_pack_plane(values[:whole] >> shift, width) for shift, width in _planes(bits)]
    if whole < values.shape[0]:
        parts.append(_pack_stream(values[whole:], bits))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def unpack(data: jax.Array, bits: int, count: int) -> jax.Array:
    """The `count` values (uint32) that `pack(values, bits)` packed into these uint8 bytes."""
    if bits in _NATIVE:
        return _from_bytes(data, _NATIVE[bits]).astype(jnp.uint32)
    whole = count // 8 * 8
    # The stream of the last values becomes one more group of 8 of every plane, so that a single
    # elementwise pass and a slice give the result.
    tail = _unpack_stream(data[whole * bits // 8 :], bits, count - whole)
    tail = jnp.pad(tail, (0, -tail.shape[0] % 8))
    total, start = whole + tail.shape[0], 0
    values = jnp.zeros((total,), jnp.uint32)
    for shift, width in _planes(bits):
        stop = start + whole * width // 8
        plane = jnp.concatenate([data[start:stop], _pack_plane(tail >> shift, width)])
        values = values | (_unpack_plane(plane, width, total) << shift)
        start = stop
    return values[:count]


def pack_trits(values: jax.Array) -> jax.Array:
    """Packs a vector of 0, 1 and 2, five a byte: ceil(count / 5) bytes.

    Byte i holds entries i, i + n, ..., i + 4n of the vector for n bytes, the first as its lowest
    digit to base 3: again elementwise passes over whole vectors.
    """
    n = -(-values.shape[0] // 5)
    digits = jnp.pad(values.astype(jnp.uint8), (0, 5 * n - values.shape[0])).reshape(5, n)
    return (digits * jnp.array([[1], [3], [9], [27], [81]], jnp.uint8)).sum(0, dtype=jnp.uint8)


def unpack_trits(data: jax.Array, count: int) -> jax.Array:
    """The `count` values (uint8) that `pack_trits` packed into these bytes.

    b // 3^i is b ceil(2^16 / 3^i) // 2^16, exactly, for bytes below 243: products vectorize. The
    digits are fenced off: fused with what uses them, each would be found by a division by n.
    """
    power = jnp.array([[65536], [21846], [7282], [2428], [810], [0]], jnp.uint32)
    data = data.astype(jnp.uint32)
    above = lambda i: (data * power[i : i + 5]) >> 16
    return fence((above(0) - 3 * above(1)).astype(jnp.uint8)).reshape(-1)[:count]


def _planes(bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the planes of a width, low bits first."""
    planes, shift = [], 0
    for width in (32, 16, 8, 4, 2, 1):
        if bits & width:
            planes.append((shift, width))
            shift += width
    return planes


def _pack_plane(values: jax.Array, width: int) -> jax.Array:
    """The low `width` bits (a power of two) of a multiple of 8 values."""
    if width >= 8:
        return _to_bytes(values.astype(_NATIVE[width]))
    low = (values & ((1 << width) - 1)).astype(jnp.uint8).reshape(-1, 8 // width)
    return (low << jnp.arange(0, 8, width, dtype=jnp.uint8)).sum(1, dtype=jnp.uint8)


def _unpack_plane(data: jax.Array, width: int, count: int) -> jax.Array:
    """The first `count` values of a plane; shifts of 32-bit words vectorize best."""
    if width >= 8:
        return _from_bytes(data, _NATIVE[width]).astype(jnp.uint32)
    words = _from_bytes(jnp.pad(data, (0, -data.shape[0] % 4)), jnp.uint32)
    shifts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    return ((words[:, None] >> shifts) & ((1 << width) - 1)).reshape(-1)[:count]


def _pack_stream(values: jax.Array, bits: int) -> jax.Array:
    """Plain little-endian bit stream of a few values."""
    flat = (values[:, None] >> jnp.arange(bits, dtype=values.dtype)).reshape(-1) & 1
    return jnp.packbits(flat.astype(jnp.uint8), bitorder="little")


def _unpack_stream(data: jax.Array, bits: int, count: int) -> jax.Array:
    if count == 0:
        return jnp.zeros((0,), jnp.uint32)
    flat = jnp.unpackbits(data, count=count * bits, bitorder="little").astype(jnp.uint32)
    shifts = jnp.arange(bits, dtype=jnp.uint32)
    return (flat.reshape(count, bits) << shifts).sum(1, dtype=jnp.uint32)


def _to_bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def _from_bytes(data: jax.Array, dtype) -> jax.Array:
    width = jnp.dtype(dtype).itemsize
    shape = (data.shape[0],) if width == 1 else (data.shape[0] // width, width)
    return jax.lax.bitcast_convert_type(data.reshape(shape), dtype)
