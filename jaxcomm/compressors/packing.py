"""Bit packing: unsigned integers at the width they need, as bytes, little-endian, no gaps.

Value i occupies bits [i*bits, (i+1)*bits) of the stream. The streams are built 32 values at a
time as `bits` words of 32 bits, in shifts and ors that XLA fuses into one elementwise pass; no
unpacked bit array is ever made.
"""

import jax
import jax.numpy as jnp

_NATIVE = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def index_bits(size: int) -> int:
    """Bits that an index into `size` elements needs (at least 1)."""
    return max(1, (size - 1).bit_length())


def pack(values: jax.Array, bits: int) -> jax.Array:
    """Packs a vector of unsigned integers < 2**bits, 1 <= bits <= 32, into uint8 bytes."""
    count = values.shape[0]
    if bits in _NATIVE:
        return _to_bytes(values.astype(_NATIVE[bits]))
    groups = -(-count // 32)
    v = jnp.pad(values.astype(jnp.uint32), (0, groups * 32 - count)).reshape(groups, 32)
    words = [jnp.zeros((groups,), jnp.uint32) for _ in range(bits)]
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (v[:, i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (v[:, i] >> (32 - shift))
    return _to_bytes(jnp.stack(words, axis=1).reshape(-1))[: packed_bytes(count, bits)]


def unpack(data: jax.Array, bits: int, count: int) -> jax.Array:
    """The `count` values (uint32) that `pack(values, bits)` packed into these uint8 bytes."""
    if bits in _NATIVE:
        return _from_bytes(data, _NATIVE[bits]).astype(jnp.uint32)
    groups = -(-count // 32)
    data = jnp.pad(data, (0, groups * bits * 4 - data.shape[0]))
    words = _from_bytes(data, jnp.uint32).reshape(groups, bits)
    mask = jnp.uint32((1 << bits) - 1)
    columns = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = words[:, word] >> shift
        if shift + bits > 32:
            value = value | (words[:, word + 1] << (32 - shift))
        columns.append(value & mask)
    return jnp.stack(columns, axis=1).reshape(-1)[:count]


def _to_bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)


def _from_bytes(data: jax.Array, dtype) -> jax.Array:
    width = jnp.dtype(dtype).itemsize
    shape = (data.shape[0],) if width == 1 else (data.shape[0] // width, width)
    return jax.lax.bitcast_convert_type(data.reshape(shape), dtype)
