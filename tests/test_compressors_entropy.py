"""Host-side coders: lossless, decodable lengths, true byte counts."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.compressors import entropy, kmeans, top_k

counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(counts)
def test_huffman_lengths_fill_kraft_and_beat_the_entropy_bound(counts):
    lengths = entropy.huffman_lengths(counts)
    used = [(c, length) for c, length in zip(counts, lengths) if c]
    assert all(length == 0 for c, length in zip(counts, lengths) if not c)
    if len(used) < 2:
        assert all(length == 0 for _, length in used)
        return
    assert sum(2.0 ** -int(length) for _, length in used) == 1.0
    total = sum(c for c, _ in used)
    mean = sum(c * length for c, length in used) / total
    bound = -sum(c / total * math.log2(c / total) for c, _ in used)
    assert bound - 1e-9 <= mean < bound + 1


def test_fedzip_code_lengths_are_one_two_two():
    lengths = entropy.huffman_lengths([10, 970, 20])
    assert lengths.tolist() == [2, 1, 2]  # not the (2, 1, 1) of the reference implementation


@pytest.mark.parametrize("coder", entropy.CODERS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=300), st.integers(7, 12))
def test_coders_are_lossless(coder, symbols, k):
    encode, decode = entropy.CODERS[coder]
    symbols = np.array(symbols, np.int64)
    np.testing.assert_array_equal(decode(encode(symbols, k)), symbols)


@pytest.mark.parametrize("coder", entropy.CODERS)
@pytest.mark.parametrize(
    ("symbols", "k", "match"),
    [
        ([0, 0, 3, 0], 3, "symbols must be from 0 to k-1=2, got 0 to 3"),
        ([0, -1], 3, "symbols must be from 0 to k-1=2, got -1 to 0"),
        ([0], 65_536, "k must be a whole number from 1 to 65535, got 65536"),
    ],
)
def test_symbols_outside_of_the_alphabet(coder, symbols, k, match):
    with pytest.raises(ValueError, match=match):
        entropy.CODERS[coder][0](np.array(symbols), k)


def skewed(n, k=3, p=0.98, seed=0):
    rest = np.full(k - 1, (1 - p) / (k - 1))
    return np.random.default_rng(seed).choice(k, n, p=np.insert(rest, k // 2, p))


@pytest.mark.parametrize("coder", entropy.CODERS)
def test_coders_on_a_long_skewed_stream(coder):
    encode, decode = entropy.CODERS[coder]
    symbols = skewed(100_003)
    data = encode(symbols, 3)
    np.testing.assert_array_equal(decode(data), symbols)
    counts = np.bincount(symbols, minlength=3)
    rare = counts.sum() - counts.max()
    if coder == "huffman":
        bits = (counts * entropy.huffman_lengths(counts)).sum()
        assert len(data) == 6 + 3 + math.ceil(bits / 8)
    if coder == "position":
        assert len(data) == 8 + 2 * 5 + math.ceil(rare * 17 / 8)
    if coder == "gap":  # within 5 % of the entropy of the gaps, geometric with p = 0.01
        p = rare / 2 / len(symbols)
        bound = rare * (-math.log2(p) - (1 - p) / p * math.log2(1 - p))
        assert bound / 8 * 0.97 < len(data) < bound / 8 * 1.05


def test_huffman_with_deep_codes():
    fibonacci = [1, 1]
    while len(fibonacci) < 20:
        fibonacci.append(sum(fibonacci[-2:]))
    assert entropy.huffman_lengths(fibonacci).max() == 19
    symbols = np.random.default_rng(0).permutation(np.repeat(np.arange(20), fibonacci))
    data = entropy.huffman_encode(symbols, 20)
    np.testing.assert_array_equal(entropy.huffman_decode(data), symbols)


@pytest.mark.parametrize("coder", [pytest.param("best", marks=pytest.mark.slow), *entropy.CODERS])
@pytest.mark.parametrize("size", [0, 1, 9, 5000])
def test_fedzip_decodes_to_what_top_k_and_kmeans_give(coder, size):
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    zipper = entropy.fedzip(0.05, coder=coder)
    data = zipper.encode(x)
    expected = kmeans(3).roundtrip(top_k(0.05).roundtrip(x)) if size else x
    np.testing.assert_array_equal(zipper.decode(data), expected)
    if size == 5000:
        assert (zipper.decode(data) != 0).sum() == 250
        lengths = {c: len(entropy.fedzip(0.05, coder=c).encode(x)) for c in entropy.CODERS}
        assert len(data) == (min(lengths.values()) if coder == "best" else lengths[coder])
        assert struct.unpack_from("<BH", data)[1] == 3
        assert 32 * size / (8 * len(data)) > 20


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"clusters": 1}, "k must be"),
        ({"coder": "lzma"}, "coder"),
        ({"iterations": -1}, "iterations"),
    ],
)
def test_fedzip_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        entropy.fedzip(**arguments)
