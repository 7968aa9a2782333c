"""What each compressor does, against the definition written out in NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compressors import FAST_COMPILE, TABLE

from jaxcomm import compressors as C
from jaxcomm.compressors import _noise
from jaxcomm.compressors._dct import dct_basis
from jaxcomm.compressors._select import (
    PIECE,
    largest,
    largest_of_blocks,
    mask_words,
    positions_of,
)
from jaxcomm.compressors._threshold import spread
from jaxcomm.compressors.base import Compressor
from jaxcomm.compressors.sparse import kept


def gaussian(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@functools.cache
def _program(c):
    return jax.jit(c.roundtrip, compiler_options=FAST_COMPILE)


def roundtrip(c, x, key=None):
    return _program(c)(x, key)


def error(c, x, key=None):
    """Relative squared error of one round trip."""
    y = np.asarray(roundtrip(c, x, key), np.float64)
    return ((y - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum()


SUMMED = ("identity", "bf16", "sign_block", "top_k", "block_top_k", "rand_k", "quantize_4_shift")


@pytest.mark.parametrize("name", [*SUMMED, "dct_top_k", "compose_top_k_2", "compose_unbiased"])
def test_decode_sum_is_the_sum_of_decodes(name):
    c, n, size = TABLE[name], 3, 73

    weights = jnp.array([1.0, 0.5, -2.0])

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def sums(x, keys):
        payloads = jax.vmap(c.encode)(x, keys)
        decoded = jax.vmap(lambda p: c.decode(p, size))(payloads)
        ours = c.decode_sum(payloads, size), c.decode_sum(payloads, size, weights)
        return ours, (decoded.sum(0), (weights[:, None] * decoded).sum(0))

    keys = jax.random.split(jax.random.key(0), n)
    ours, expected = sums(gaussian(n * size).reshape(n, size), keys)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=4e-6)


def test_decode_sum_of_many_workers():
    c, n, size = C.sign(), 40, 73  # the base class's loop
    payloads = jax.vmap(c.encode)(gaussian(n * size).reshape(n, size))
    expected = jax.vmap(lambda p: c.decode(p, size))(payloads).sum(0)
    total = jax.jit(c.decode_sum, static_argnums=1)(payloads, size)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(("shape", "dtype"), [((4, 5), jnp.bfloat16), ((), jnp.float32)])
def test_roundtrip_keeps_shape_and_dtype(name, shape, dtype):
    x, key = jax.ShapeDtypeStruct(shape, dtype), jax.eval_shape(lambda: jax.random.key(0))
    y = jax.eval_shape(TABLE[name].roundtrip, x, key)
    assert (y.shape, y.dtype) == (shape, dtype)


def test_roundtrip_of_bfloat16_is_that_of_its_float32():
    x = jnp.asarray(gaussian(50)).astype(jnp.bfloat16).reshape(5, 10)
    for name in ("sign_l1", "top_k", "quantize_8", "fp4"):
        expected = roundtrip(TABLE[name], x.astype(jnp.float32)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(roundtrip(TABLE[name], x), expected)


@pytest.mark.parametrize("name", TABLE)
def test_any_real_vector_is_taken_and_no_other_shape(name):
    """NumPy's inside a trace, and float64's, have the payload of a float32; no gradient passes."""
    c, x, key = TABLE[name], gaussian(9), jax.random.key(0)
    numbers = jax.eval_shape(lambda key: c.encode(x, key), key)
    assert numbers == jax.eval_shape(lambda key: c.encode(x > 0, key), key) == c.payload_shapes(9)
    keys = jax.random.split(key, 3)
    assert jax.eval_shape(jax.vmap(lambda key: c.roundtrip(x, key)), keys).shape == (3, 9)
    with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct((9,), jnp.float64)
        assert jax.eval_shape(c.encode, wide, key) == numbers
        assert jax.eval_shape(c.roundtrip, wide, key).dtype == jnp.float64
    gradient = jax.grad(lambda x: c.roundtrip(x, key).sum())
    assert jax.eval_shape(gradient, jnp.asarray(x)).shape == (9,)
    with pytest.raises(ValueError, match=r"got shape \(3, 3\); roundtrip takes any shape"):
        jax.eval_shape(c.encode, x.reshape(3, 3), key)


def test_other_dtypes_are_cast_and_derivatives_are_zero():
    x, codecs = np.arange(-3, 5), [TABLE[name] for name in ("identity", "top_k", "quantize_4")]

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def program(x):
        slope = lambda c: jax.grad(lambda v: c.roundtrip(v).sum())(x.astype(jnp.float32))
        return [c.encode(x) for c in codecs], [slope(c) for c in codecs]

    expected, slopes = program(x.astype(np.float32))
    assert not np.asarray(slopes).any()
    for dtype in (np.int32, jnp.bfloat16):
        found = jax.tree.leaves(program(x.astype(dtype))[0])
        assert all((a == b).all() for a, b in zip(found, jax.tree.leaves(expected), strict=True))


@pytest.mark.parametrize("name", TABLE)
def test_random_codecs_ask_for_a_key(name):
    c, x = TABLE[name], jax.ShapeDtypeStruct((9,), jnp.float32)
    random = c.omega(9) is not None and name != "identity"
    random |= any(word in name for word in ("rand_k", "stochastic", "unbiased"))
    if random:
        with pytest.raises(ValueError, match="key"):
            jax.eval_shape(c.encode, x)
    else:
        jax.eval_shape(c.encode, x)


def test_compressors_are_values():
    assert C.top_k(0.1) == C.top_k(0.1) != C.top_k(0.2)
    assert all(hash(c) == hash(dataclasses.replace(c)) for c in TABLE.values())
    assert {n for n, c in TABLE.items() if c.shared_key} == {
        *("rand_k", "rand_k_scaled", "compose_unbiased"),
        *("quantize_4_shift", "quantize_1_shift", "quantize_6_minmax_shift"),
    }


@pytest.mark.parametrize(
    "name", ["e4m3", "sign_l1", "top_k", "quantize_4", "quantize_2", "ternary", "fp4", "kmeans_3"]
)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9, width=32, allow_subnormal=False), min_size=9, max_size=9))
def test_contraction_of_any_vector(name, values):
    x = np.array(values, np.float32)
    x[np.abs(x) < 1e-20] = 0
    y = np.asarray(roundtrip(TABLE[name], x), np.float64)
    norm = (x.astype(np.float64) ** 2).sum()
    assert ((y - x) ** 2).sum() <= (1 - TABLE[name].alpha(9)) * norm * (1 + 1e-5) + 1e-11 * norm


LARGE = {
    **{n: TABLE[n] for n in ("identity", "bf16", "e4m3", "sign_l1", "natural", "fp4", "kmeans_3")},
    **{
        n: TABLE[n]
        for n in ("ternary", "quantize_8", "quantize_3_stochastic", "quantize_6_minmax_shift")
    },
    **{n: TABLE[n] for n in ("qsgd_7", "natural_dithering_7", "dct_top_k", "compose_top_k_2")},
    "top_k": C.top_k(0.01),
    "block_top_k": C.block_top_k(0.01),
    "threshold_top_k": C.threshold_top_k(0.01),
    "rand_k": C.rand_k(0.01),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_million_and_three(name):
    c, size = LARGE[name], 1_000_003
    x = gaussian(size)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(x, key):
        payload = c.encode(x, key)
        return payload, c.decode(payload, size)

    payload, y = both(x, jax.random.key(0))
    assert sum(np.asarray(p).nbytes for p in payload.values()) == c.payload_bytes(size)
    y = np.asarray(y, np.float64)
    measured = ((y - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum()
    worst = 1 - c.alpha(size) if c.alpha(size) is not None else c.omega(size)
    assert measured <= (1.0 if worst is None else worst * 1.01 + 1e-12)
    kept_energy = {"top_k": 0.084, "block_top_k": 0.084, "threshold_top_k": 0.084, "rand_k": 0.01}
    if name in kept_energy:  # E[x^2; |x| > 2.576] = 0.0845 of a Gaussian's energy in 1 %
        assert 1 - measured == pytest.approx(kept_energy[name], rel=0.08)


class TestTopK:
    @pytest.mark.parametrize(
        ("fraction", "size", "expected"),
        [(0.07, 100, 7), (0.1, 3, 1), (0.01, 1, 1), (1.0, 9, 9), (0.29, 100, 29), (0.5, 7, 4)],
    )
    def test_count(self, fraction, size, expected):
        assert kept(fraction, None, size) == expected

    def test_largest_magnitudes_and_ties_by_position(self):
        x = jnp.array([1.0, -3.0, 3.0, 0.5, 3.0, -3.0])
        assert roundtrip(C.top_k(k=2), x).tolist() == [0, -3, 3, 0, 0, 0]
        assert roundtrip(C.top_k(k=5), x).tolist() == [1, -3, 3, 0, 3, -3]

    @pytest.mark.parametrize("size", [50, 96, 100])
    def test_block_top_k_is_top_k_of_each_block(self, size):
        x, c = gaussian(size), C.block_top_k(0.1, block_size=32)
        expected = np.zeros_like(x)
        for start in range(0, size, 32):
            block = np.abs(x[start : start + 32])
            where = start + np.argsort(-block, kind="stable")[: -(-len(block) // 10)]
            expected[where] = x[where]
        np.testing.assert_array_equal(roundtrip(c, x), expected)

    def test_k_larger_than_the_vector(self):
        c = C.top_k(k=10)
        for call in (c.payload_bytes, c.alpha):
            with pytest.raises(ValueError, match="k=10 for size 9"):
                call(9)
        assert c.payload_bytes(0) == 0


class TestSign:
    def test_specification_figures(self):
        """Error ratios 0.364 (l1) and 0.406 (l2) on a Gaussian, 0.990 and 1.80 when 1 % sparse."""
        x = gaussian(100_000)
        assert error(C.sign("l1"), x) == pytest.approx(0.364, abs=0.003)
        assert error(C.sign("l2"), x) == pytest.approx(0.406, abs=0.003)
        x[np.random.default_rng(1).random(x.size) > 0.01] = 0
        assert error(C.sign("l1"), x) == pytest.approx(0.994, abs=0.005)
        assert error(C.sign("l2"), x) == pytest.approx(1.84, abs=0.05)
        assert C.sign("l2").alpha(100) is None

    @pytest.mark.parametrize("block_size", [None, 4])
    def test_scale_of_very_large_and_small_values(self, block_size):
        """Their squares are no float32."""
        x, c = np.array([1, -2, 3, -1, 5, 0], np.float32), C.sign("l2", block_size)
        for scale in (1e-25, 1e25):
            expected = np.float64(roundtrip(c, x)) * scale
            np.testing.assert_allclose(roundtrip(c, np.float32(x * scale)), expected, rtol=1e-5)

    @pytest.mark.parametrize("scale", ["l1", "l2"])
    def test_chunks_share_the_scale_of_the_true_vector(self, scale):
        x, c = gaussian(21), C.sign(scale)
        chunks = jnp.pad(jnp.asarray(x), (0, 3)).reshape(4, 6)
        payload = c.encode_chunks(chunks, size=21)
        decoded = jax.vmap(lambda p: c.decode(p, 6))(payload).reshape(-1)[:21]
        np.testing.assert_allclose(decoded, roundtrip(c, x), rtol=1e-6)

    def test_blocks_of_chunks_leave_padding_out(self):
        x, c = gaussian(21), C.sign(block_size=4)
        chunks = jnp.pad(jnp.asarray(x), (0, 3)).reshape(3, 8)
        payload = c.encode_chunks(chunks, size=21)
        decoded = jax.vmap(lambda p: c.decode(p, 8))(payload).reshape(-1)[:21]
        np.testing.assert_allclose(decoded, roundtrip(c, x), rtol=1e-6)

    def test_zero_counts_as_positive(self):
        y = roundtrip(C.sign(), jnp.array([-4.0, 0.0, -0.0, 4.0]))
        assert y.tolist() == [-2.0, 2.0, 2.0, 2.0]


class TestRandK:
    def test_positions_come_from_the_payload_and_are_distinct(self):
        c, size = C.rand_k(0.3), 101
        payload = c.encode(jnp.ones(size), jax.random.key(3))
        assert payload["seed"].dtype == jnp.uint32
        assert payload["seed"].nbytes == 8
        y = np.asarray(c.decode(payload, size))
        assert (y == 1).sum() == 31 == c.count(size)
        other = c.encode(jnp.full(size, 2.0), jax.random.key(3))
        np.testing.assert_array_equal(np.asarray(c.decode(other, size)) == 2, y == 1)

    def test_every_coordinate_is_as_likely(self):
        c, size, seeds = C.rand_k(k=3), 10, 4000
        keys = jax.random.split(jax.random.key(0), seeds)
        y = jax.jit(jax.vmap(lambda k: c.roundtrip(jnp.ones(size), k)))(keys)
        hits = np.asarray(y).sum(0)
        assert np.abs(hits - 0.3 * seeds).max() < 5 * np.sqrt(0.21 * seeds)


class TestSelection:
    """Against a stable sort, with ties, NaN and infinity among the values."""

    def example(self, shape):
        x = np.round(gaussian(int(np.prod(shape))) * 4) / 4  # many equal magnitudes
        x[5:8] = np.nan, np.inf, -np.inf
        return x.reshape(shape)

    @staticmethod
    def expected(x, k):
        size = np.where(np.isnan(x), np.inf, np.abs(x))
        return np.sort(np.argsort(-size, axis=-1, kind="stable")[..., :k], axis=-1)

    @pytest.mark.parametrize("k", [1, 3, 500, 4999, 5000])
    def test_whole_vectors(self, k):
        x = self.example(5000)
        x[5] = 0.0  # NaN stands above infinity here, beside it in the reference
        where = jax.jit(largest, static_argnums=1)(x, k)
        np.testing.assert_array_equal(np.sort(where), self.expected(x, k))

    @pytest.mark.parametrize("k", [1, 5, 30])
    def test_rows(self, k):
        x = self.example((40, 100))
        where = jax.jit(largest, static_argnums=1)(x, k)
        np.testing.assert_array_equal(np.sort(where, axis=1), self.expected(x, k))

    @pytest.mark.parametrize("k", [1, 5])
    def test_blocks_in_pieces(self, k):
        """As all rows at once, with blocks that two pieces hold and elements after the last."""
        n, b = 2 * PIECE // 64 + 7, 64
        x = self.example((n * b + 5,))
        x[-9:-3] = np.nan, np.inf, -np.inf, 9.0, 9.0, -9.0
        where = jax.jit(largest_of_blocks, static_argnums=(1, 2))(x, b, k)
        rows = x[: n * b].reshape(n, b)
        np.testing.assert_array_equal(np.sort(where, axis=1), self.expected(rows, k))

    def test_pieces_vary_over_mesh_axes(self):
        mesh = jax.make_mesh((2,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
        spec, size = jax.sharding.PartitionSpec("w"), 2 * PIECE + 100
        c, x = C.block_top_k(0.01), gaussian(2 * size).reshape(2, size)
        each = lambda x: c.roundtrip(x[0])[None]
        mapped = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec))(x)
        np.testing.assert_array_equal(mapped, jax.jit(jax.vmap(c.roundtrip))(x))

    def test_selection_varies_over_mesh_axes(self):
        """Loop carries have the type of the data: check_vma passes, results are those of vmap."""
        mesh = jax.make_mesh((2,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
        codecs = (C.top_k(0.01), C.block_top_k(0.01), C.threshold_top_k(0.01), C.kmeans(3))
        codecs += (C.compose(C.threshold_top_k(0.01), C.sign()),)
        each = lambda x: jnp.stack([c.roundtrip(x[0]) for c in codecs])[None]
        spec = jax.sharding.PartitionSpec("w")
        x = gaussian(10_000).reshape(2, 5000)
        fast = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        mapped = fast(jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec))(x)
        np.testing.assert_allclose(mapped, fast(jax.vmap(each))(x[:, None])[:, 0], rtol=1e-6)

    def test_nan_is_sent(self):
        x = gaussian(6000)
        x[77] = np.nan
        for c in (C.top_k(0.01), C.block_top_k(0.01), C.threshold_top_k(0.01)):
            assert np.isnan(np.asarray(roundtrip(c, x))[77])


class TestThreshold:
    def test_positions_of_set_bits(self):
        mask = np.random.default_rng(0).random(5000) < 0.03
        where = positions_of(mask_words(jnp.asarray(mask)), jnp.arange(mask.sum()))
        np.testing.assert_array_equal(where, np.flatnonzero(mask))

    @pytest.mark.parametrize(("hits", "slots"), [(5, 10), (10, 10), (13, 10), (10**8, 10**6 + 1)])
    def test_spread_ranks(self, hits, slots):
        ranks = np.asarray(spread(jnp.arange(slots), jnp.int32(hits), slots))
        assert ranks[0] == 0
        assert (np.diff(ranks) > 0).all()
        if hits > slots:
            assert ranks[-1] < hits
            expected = np.arange(slots) * (hits / slots)
            np.testing.assert_allclose(ranks, expected, atol=2 + hits / slots)

    def test_overfull_slots_favour_no_part_of_the_vector(self):
        y = np.asarray(roundtrip(C.threshold_top_k(0.01), jnp.ones(100_000)))
        assert y.sum() == 1000
        per_tenth = y.reshape(10, -1).sum(1)
        assert np.abs(per_tenth - 100).max() <= 1

    def test_few_hits_leave_slots_empty(self):
        # The sample (stride 1 mod 32, start 0) meets every large value; it asks for few of them.
        x = np.zeros(200_000, np.float32)
        x[::1000] = 5.0
        x[7] = 9.0
        c = C.threshold_top_k(0.01)
        np.testing.assert_array_equal(roundtrip(c, x), x)

    @pytest.mark.parametrize(
        "quantizer",
        [
            *(C.sign(), C.quantize(1), C.quantize(4, scheme="minmax")),
            *(C.quantize(4, rounding="shift"), C.kmeans(pin_zero=False)),
        ],
    )
    def test_empty_slots_decode_to_nothing(self, quantizer):
        """Whatever the quantizer makes of their zeros; coordinate 0 may be sent itself."""
        c, size = C.compose(C.threshold_top_k(0.05), quantizer), 1024
        x = np.zeros((3, size), np.float32)
        x[0, [0, 500, 700]], x[1, [500, 999]] = (3.0, -2.0, 1.0), 2.0

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def both(x, keys):
            payloads = jax.vmap(c.encode)(x, keys)
            return jax.vmap(lambda p: c.decode(p, size))(payloads), c.decode_sum(payloads, size)

        y, total = both(x, jax.random.split(jax.random.key(0), 3))
        assert not np.asarray(y)[x == 0].any()
        np.testing.assert_allclose(total, y.sum(0), rtol=1e-6)

    def test_hits_are_the_largest(self):
        x, c = gaussian(300_000), C.threshold_top_k(0.01)
        y = np.asarray(roundtrip(c, x, jax.random.key(2)))
        sent = y != 0
        assert 0.7 * 3000 < sent.sum() <= 3000
        exact = np.sort(np.abs(x))[-3000:]
        assert (y**2).sum() > 0.85 * (exact**2).sum()


class TestStochasticRounding:
    def test_whole_numbers_stay(self):
        v = jnp.array([127.0, 0.0, 32767.0, -5.0, 0.5, -0.25])
        assert _noise.rounded(v, 1 - 2.0**-24).tolist() == [127, 0, 32767, -5, 1, 0]
        assert _noise.rounded(v, 0.0).tolist() == [127, 0, 32767, -5, 0, -1]

    @pytest.mark.parametrize(
        "c", [C.qsgd(32_767, None, norm="max"), C.quantize(8, None, rounding="stochastic")]
    )
    def test_zeros_are_exact_beside_other_values(self, c):
        x = np.zeros(1 << 20, np.float32)
        x[7] = 1.0
        assert np.flatnonzero(roundtrip(c, x, jax.random.key(1))).tolist() == [7]


class TestQuantize:
    @pytest.mark.parametrize("block_size", [None, 4])
    def test_one_bit_chunks_leave_padding_out(self, block_size):
        x, c = gaussian(21), C.quantize(1, block_size)
        chunks = jnp.pad(jnp.asarray(x), (0, 3)).reshape(3, 8)
        each = jax.vmap(lambda p: c.decode(p, 8))
        fast = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        decoded = fast(lambda x: each(c.encode_chunks(x, size=21)))(chunks).reshape(-1)[:21]
        expected = [roundtrip(c, x[i : i + 8]) for i in range(0, 21, 8)]
        np.testing.assert_allclose(decoded, np.concatenate(expected), rtol=1e-6)

    def test_block_error_figures(self):
        """Sheet ZeRO++ A6: INT8 relative error .0207 / .0082 / .0070, INT4 .252 / .131 / .112."""
        scales = np.repeat([0.02, 0.05, 0.005, 0.2], 250_000).astype(np.float32)
        x = gaussian(1_000_000) * scales
        expected = {8: (0.0207, 0.0082, 0.0070), 4: (0.252, 0.131, 0.112)}
        for bits, figures in expected.items():
            for block, figure in zip((None, 2048, 256), figures):
                measured = np.sqrt(error(C.quantize(bits, block), x))
                assert measured == pytest.approx(figure, rel=0.12)

    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_error_is_half_a_step_or_one_where_clipped(self, bits):
        x = gaussian(1000)
        c = C.quantize(bits, 100)
        payload = c.encode(x)
        step = np.abs(np.repeat(np.asarray(payload["scale"]), 100))
        wrong = np.abs(np.asarray(c.decode(payload, 1000)) - x)
        top = x.reshape(10, 100)[np.arange(10), np.abs(x.reshape(10, 100)).argmax(1)]
        other_sign = np.sign(x) != np.sign(np.repeat(top, 100))
        assert (wrong <= step * np.where(other_sign, 1.0, 0.5) * (1 + 1e-5)).all()
        assert (wrong[x == np.repeat(top, 100)] == 0).all()

    def test_shift_error_has_the_same_variance_everywhere(self):
        """QSDP: uniform error, variance step^2 / 12, whatever the value."""
        c, x = C.quantize(3, rounding="shift"), jnp.linspace(-1, 1, 41)
        keys = jax.random.split(jax.random.key(0), 4000)
        wrong = np.asarray(jax.jit(jax.vmap(lambda k: c.roundtrip(x, k)))(keys)) - np.asarray(x)
        step = 2 / 7
        np.testing.assert_allclose(wrong.var(0), step**2 / 12, rtol=0.1)
        assert np.abs(wrong).max() <= step / 2 * (1 + 1e-5)

    def test_minmax_ends_are_exact(self):
        x = gaussian(512) + 3
        y = np.asarray(roundtrip(C.quantize(4, 128, scheme="minmax"), x)).reshape(4, 128)
        rows = x.reshape(4, 128)
        for pick in (np.argmin, np.argmax):
            at = (np.arange(4), pick(rows, 1))
            np.testing.assert_allclose(y[at], rows[at], rtol=1e-6)

    @pytest.mark.parametrize("bits", [2, 3])
    def test_learned_levels_beat_uniform_ones(self, bits):
        x = gaussian(20_000)
        levels = C.learn_levels(x, bits, block_size=256)
        learned = C.quantize(bits, scheme="minmax", levels=levels)
        uniform = C.quantize(bits, scheme="minmax")
        fresh = gaussian(20_000, seed=1)
        assert error(learned, fresh) < 0.75 * error(uniform, fresh)

    def test_learned_levels_that_meet_stay_apart(self):
        levels = C.learn_levels(jnp.ones(100), 4)
        assert len(levels) == 16
        assert all(a < b for a, b in itertools.pairwise(levels))
        C.quantize(4, scheme="minmax", levels=levels)


class TestTernary:
    @pytest.mark.parametrize(("size", "block"), [(7, 7), (100, 32), (64, None)])
    def test_definition(self, size, block):
        x, blocks = gaussian(size), range(0, size, block or size)
        x[3], expected = 0.0, np.zeros(size)
        for part in (slice(start, start + (block or size)) for start in blocks):
            magnitudes = np.abs(x[part])
            sent = magnitudes > 0.7 * magnitudes.mean()
            expected[part] = np.where(sent, np.sign(x[part]) * magnitudes[sent].mean(), 0)
        np.testing.assert_allclose(roundtrip(C.ternary(block), x), expected, rtol=1e-5)

    def test_gaussian_error(self):
        """Near the best three values (0.190); without a threshold it is the sign's 1 - 2 / pi."""
        x = gaussian(200_000)
        assert error(C.ternary(None), x) == pytest.approx(0.1907, rel=0.01)
        assert error(C.ternary(None, threshold=0.0), x) == pytest.approx(1 - 2 / np.pi, rel=0.01)
        assert error(C.ternary(256), x) < error(C.quantize(2, 256), x)

    @pytest.mark.parametrize("threshold", [-0.1, 1.0])
    def test_threshold_is_checked(self, threshold):
        with pytest.raises(ValueError, match="threshold must be in"):
            C.ternary(threshold=threshold)


class TestNatural:
    def test_neighbouring_powers_and_nothing_else(self):
        x = jnp.array([3.0, -0.7, 4.0, -1.0, 0.0, 3.3e38, 1e-30])
        keys = jax.random.split(jax.random.key(0), 200)
        y = np.asarray(jax.vmap(lambda k: C.natural().roundtrip(x, k))(keys))
        assert set(y[:, 0]) == {2.0, 4.0}
        assert set(y[:, 1]) == {-0.5, -1.0}
        assert set(y[:, 2]) == {4.0}
        assert set(y[:, 4]) == {0.0}
        assert set(y[:, 5]) == {2.0**127}

    def test_dithering_levels_are_powers_of_two(self):
        x = jnp.asarray(gaussian(64))
        y = roundtrip(C.natural_dithering(4, None, norm="max"), x, jax.random.key(0))
        levels = np.abs(np.asarray(y)) / np.abs(np.asarray(x)).max()
        assert set(levels.tolist()) <= {0.0, 0.125, 0.25, 0.5, 1.0}

    def test_qsgd_rounds_to_neighbouring_levels(self):
        x = jnp.asarray(gaussian(64))
        y = np.asarray(roundtrip(C.qsgd(7, None), x, jax.random.key(0)), np.float64)
        step = float(jnp.linalg.norm(x)) / 7
        np.testing.assert_allclose(y / step, np.round(y / step), atol=1e-5)
        assert np.abs(y - np.asarray(x)).max() <= step * (1 + 1e-5)


class TestFp4:
    def test_grid(self):
        grid = [0.0, *(2.0**-j for j in range(7))]
        x = np.linspace(-1, 1, 4001).astype(np.float32)
        y = np.asarray(roundtrip(C.fp4_e3m0(), x))
        best = np.array(sorted([*grid, *(-g for g in grid)]))
        nearest = np.abs(x[:, None] - best).min(1)
        np.testing.assert_allclose(np.abs(y - x), nearest, atol=1e-7)
        inside = np.abs(x) >= 2.0**-6
        assert (np.abs(y - x)[inside] <= np.abs(x)[inside] / 3 * (1 + 1e-6)).all()


class TestKMeans:
    def test_distortion_never_increases(self):
        x = gaussian(3000) ** 3
        errors = [error(C.kmeans(5, iterations), x) for iterations in range(7)]
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
        assert errors[-1] < 0.7 * errors[0]

    def test_zeros_stay_zeros(self):
        x = np.asarray(roundtrip(C.top_k(0.05), gaussian(1000)))
        y = np.asarray(roundtrip(C.kmeans(3), x))
        assert (y[x == 0] == 0).all()
        assert len(set(y.tolist())) == 3

    def test_empty_clusters_stay(self):
        x = jnp.array([-10.0, -10.0, 9.0])  # 5 centroids, 2 distinct values
        np.testing.assert_allclose(roundtrip(C.kmeans(5), x), x)


class TestDct:
    def test_basis_is_orthonormal(self):
        b = dct_basis(64).astype(np.float64)
        np.testing.assert_allclose(b @ b.T, np.eye(64), atol=1e-6)

    def test_all_coefficients_are_the_vector(self):
        x = gaussian(200)
        np.testing.assert_allclose(roundtrip(C.dct_top_k(64), x), x, atol=1e-5)

    def test_smooth_vectors_need_few(self):
        x = np.cos(np.arange(1024) / 50).astype(np.float32)
        assert error(C.dct_top_k(4, 64), x) < 0.01 < error(C.block_top_k(k=4, block_size=64), x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: C.cast(jnp.int8), "dtype must be one of"),
        (lambda: C.cast("float4"), "dtype must be one of"),
        (lambda: C.sign("linf"), "'l1' or 'l2', got 'linf'"),
        (lambda: C.sign(block_size=0), "block_size must be a whole number, at least 1, got 0"),
        (lambda: C.sign(block_size=2.5), "sign: block_size must be .* at least 1, got 2.5"),
        (lambda: C.block_top_k(0.1, block_size=2.5), "block_top_k: block_size .* got 2.5"),
        (lambda: C.top_k(), "exactly one of fraction and k"),
        (lambda: C.top_k(0.1, k=3), "exactly one of fraction and k"),
        (lambda: C.top_k(0.0), r"fraction must be in \(0, 1\], got 0.0"),
        (lambda: C.top_k(1.5), r"fraction must be in \(0, 1\], got 1.5"),
        (lambda: C.top_k(k=0), "k must be a whole number, at least 1, got 0"),
        (lambda: C.block_top_k(k=65, block_size=64), "at most block_size=64, got 65"),
        (lambda: C.rand_k(-0.1), "rand_k: fraction"),
        (lambda: C.threshold_top_k(0.1, sample=0), "sample must be in"),
        (lambda: C.quantize(9), "bits must be a whole number from 1 to 8, got 9"),
        (lambda: C.learn_levels(jnp.ones(3), 2.5), "learn_levels: bits .* got 2.5"),
        (lambda: C.learn_levels(jnp.ones(3), 2, block_size=0), "learn_levels: block_size .* got 0"),
        (lambda: C.learn_levels(jnp.ones(3), 2, samples=0), "learn_levels: samples .* got 0"),
        (lambda: C.quantize(4, 0), "block_size"),
        (lambda: C.quantize(4, rounding="up"), "rounding must be"),
        (lambda: C.quantize(4, scheme="affine"), "scheme must be"),
        (lambda: C.quantize(1, scheme="minmax", levels=(0.5, 0.1)), "2 increasing numbers"),
        (lambda: C.quantize(2, levels=(0, 0.2, 0.5, 1)), "scheme='minmax'"),
        (lambda: C.qsgd(0), "levels must be a whole number from 1 to 32767, got 0"),
        (lambda: C.qsgd(2.5), "qsgd: levels .* got 2.5"),
        (lambda: C.qsgd(7, norm="l1"), "'l2' or 'max'"),
        (lambda: C.natural_dithering(101), "levels must be a whole number from 1 to 100"),
        (lambda: C.kmeans(1), "k must be a whole number from 2 to 256, got 1"),
        (lambda: C.kmeans(3, 1.5), "kmeans: iterations .* got 1.5"),
        (lambda: C.dct_top_k(1.5), "dct_top_k: k .* got 1.5"),
        (lambda: C.dct_top_k(1, 2.5), "dct_top_k: chunk .* got 2.5"),
        (lambda: C.dct_top_k(65, 64), "k must be a whole number from 1 to 64, got 65"),
        (lambda: C.compose(C.sign(), C.quantize(2)), "sparsifier must be a sparse"),
        (lambda: C.compose(C.top_k(0.1), C.top_k(0.1)), "quantizer must be a dense compressor"),
    ],
)
def test_construction_errors_name_the_rule(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_whole_floats_are_integers():
    pairs = [
        (C.top_k(k=4.0), C.top_k(k=4)),
        (C.rand_k(k=4.0), C.rand_k(k=4)),
        (C.block_top_k(k=4.0, block_size=32.0), C.block_top_k(k=4, block_size=32)),
        (C.sign(block_size=16.0), C.sign(block_size=16)),
        (C.quantize(8.0, np.float32(32)), C.quantize(8, 32)),
        (C.qsgd(7.0, 32.0), C.qsgd(7, 32)),
        (C.natural_dithering(7.0), C.natural_dithering(7)),
        (C.kmeans(3.0, 2.0), C.kmeans(3, 2)),
        (C.dct_top_k(2.0, 64.0), C.dct_top_k(2, 64)),
        (C.ternary(32.0), C.ternary(32)),
        (C.fp4_e3m0(32.0), C.fp4_e3m0(32)),
    ]
    for floats, integers in pairs:
        assert repr(floats) == repr(integers)


def test_every_factory_gives_a_compressor():
    assert all(isinstance(c, Compressor) for c in TABLE.values())
