"""Packing is exact: every width, every count, no wasted byte."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.compressors.packing import (
    index_bits,
    pack,
    pack_trits,
    packed_bytes,
    unpack,
    unpack_trits,
)


@pytest.mark.parametrize("bits", range(1, 33))
def test_inverse_for_every_width(bits):
    rng = np.random.default_rng(bits)
    top = 2**bits - 1

    @jax.jit
    def there_and_back(v):
        data = [pack(v[:n], bits) for n in counts]
        return data, [unpack(d, bits, n) for d, n in zip(data, counts)]

    counts = (0, 1, 7, 8, 9, 100)
    v = rng.integers(0, top, 100, dtype=np.uint32, endpoint=True)
    v[:2] = top, 0
    for n, data, back in zip(counts, *there_and_back(v)):
        assert data.dtype == jnp.uint8
        assert back.dtype == jnp.uint32
        assert data.size == packed_bytes(n, bits) == -(-n * bits // 8)
        np.testing.assert_array_equal(back, v[:n])


@functools.partial(jax.jit, static_argnums=(1,))
def _there_and_back(v, bits):
    return unpack(pack(v, bits), bits, v.shape[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((1, 5, 10, 27)), st.sampled_from((3, 16, 33)), st.randoms())
def test_inverse_property(bits, count, random):
    v = np.array([random.getrandbits(bits) for _ in range(count)], np.uint32)
    np.testing.assert_array_equal(_there_and_back(v, bits), v)


def test_one_bit_layout_is_little_endian_packbits():
    v = np.random.default_rng(0).integers(0, 2, 1001).astype(np.uint8)
    np.testing.assert_array_equal(pack(jnp.asarray(v), 1), np.packbits(v, bitorder="little"))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 243, 1001])
def test_five_trits_a_byte(count):
    v = np.random.default_rng(count).integers(0, 3, count)
    data = pack_trits(jnp.asarray(v))
    assert data.dtype == jnp.uint8
    assert data.size == -(-count // 5)
    np.testing.assert_array_equal(unpack_trits(data, count), v)


def test_every_byte_of_trits():
    """Five planes of one byte each, the first one the lowest digit."""
    data = jnp.arange(243, dtype=jnp.uint8)
    trits = unpack_trits(data, 5 * 243).astype(int).reshape(5, 243)
    np.testing.assert_array_equal((3 ** np.arange(5)) @ trits, np.arange(243))
    np.testing.assert_array_equal(pack_trits(trits.reshape(-1)), data)


@pytest.mark.parametrize(("size", "bits"), [(0, 1), (1, 1), (2, 1), (3, 2), (1024, 10), (1025, 11)])
def test_index_bits(size, bits):
    assert index_bits(size) == bits
