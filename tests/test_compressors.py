"""Every compressor: shapes, bytes, constants, zeros; over sizes, distributions and seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm import compressors as C

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SIZES = (0, 1, 7, 8, 9, 1000)

TABLE = {
    "identity": C.identity(),
    "bf16": C.cast(jnp.bfloat16),
    "fp16": C.cast("fp16"),
    "e4m3": C.cast("float8_e4m3fn"),
    "e5m2": C.cast(jnp.float8_e5m2),
    "sign_l1": C.sign(),
    "sign_l2": C.sign("l2"),
    "sign_block": C.sign(block_size=64),
    "top_k": C.top_k(0.07),
    "block_top_k": C.block_top_k(0.1, block_size=48),
    "threshold_top_k": C.threshold_top_k(0.05),
    "rand_k": C.rand_k(0.1),
    "rand_k_scaled": C.rand_k(0.3, scaled=True),
    "quantize_8": C.quantize(8),
    "quantize_4": C.quantize(4, 64),
    "quantize_2": C.quantize(2, None),
    "quantize_1": C.quantize(1, 16),
    "quantize_5_minmax": C.quantize(5, 64, scheme="minmax"),
    "quantize_3_stochastic": C.quantize(3, 64, rounding="stochastic"),
    "quantize_1_stochastic": C.quantize(1, 16, rounding="stochastic"),
    "quantize_4_minmax_stochastic": C.quantize(4, 64, rounding="stochastic", scheme="minmax"),
    "quantize_4_shift": C.quantize(4, 64, rounding="shift"),
    "quantize_1_shift": C.quantize(1, 16, rounding="shift"),
    "quantize_6_minmax_shift": C.quantize(6, 64, rounding="shift", scheme="minmax"),
    "quantize_levels": C.quantize(2, 4, scheme="minmax", levels=(0.0, 0.25, 0.6, 1.0)),
    "ternary": C.ternary(64),
    "ternary_0": C.ternary(None, threshold=0.0),
    "qsgd_7": C.qsgd(7, 128),
    "qsgd_127_max": C.qsgd(127, None, norm="max"),
    "natural": C.natural(),
    "natural_dithering_7": C.natural_dithering(7, 128),
    "natural_dithering_2_max": C.natural_dithering(2, None, norm="max"),
    "fp4": C.fp4_e3m0(),
    "fp4_block": C.fp4_e3m0(64),
    "kmeans_3": C.kmeans(),
    "kmeans_8": C.kmeans(8, 2, pin_zero=False),
    "dct_top_k": C.dct_top_k(8, 64),
    "compose_top_k_2": C.compose(C.top_k(0.1), C.quantize(2)),
    "compose_block_stochastic": C.compose(
        C.block_top_k(k=4, block_size=64), C.quantize(8, rounding="stochastic")
    ),
    "compose_unbiased": C.compose(C.rand_k(0.3, scaled=True), C.qsgd(127)),
    "compose_dct_sign": C.compose(C.dct_top_k(4, 32), C.sign()),
    "compose_threshold_bf16": C.compose(C.threshold_top_k(0.1), C.cast("bf16")),
}

#: Bytes of 1000 coordinates, from the formats' descriptions.
BYTES_OF_1000 = {
    "identity": 4000,
    "bf16": 2000,
    "fp16": 2004,
    "e4m3": 1004,
    "e5m2": 1004,
    "sign_l1": 129,
    "sign_l2": 129,
    "sign_block": 125 + 16 * 4,
    "top_k": 70 * 4 + 88,
    "block_top_k": 104 * 4 + 78,
    "threshold_top_k": 50 * 4 + 63,
    "rand_k": 408,
    "rand_k_scaled": 1208,
    "quantize_8": 1016,
    "quantize_4": 500 + 64,
    "quantize_2": 254,
    "quantize_1": 125 + 63 * 4,
    "quantize_5_minmax": 625 + 128,
    "quantize_3_stochastic": 375 + 64,
    "quantize_1_stochastic": 125 + 63 * 4,
    "quantize_4_minmax_stochastic": 500 + 128,
    "quantize_4_shift": 500 + 64 + 4,
    "quantize_1_shift": 125 + 63 * 4 + 4,
    "quantize_6_minmax_shift": 750 + 128 + 4,
    "quantize_levels": 250 + 2000,
    "ternary": 200 + 16 * 4,
    "ternary_0": 204,
    "qsgd_7": 500 + 32,
    "qsgd_127_max": 1004,
    "natural": 1125,
    "natural_dithering_7": 500 + 32,
    "natural_dithering_2_max": 375 + 4,
    "fp4": 504,
    "fp4_block": 564,
    "kmeans_3": 250 + 12,
    "kmeans_8": 375 + 32,
    "dct_top_k": 128 * 4 + 96,
    "compose_top_k_2": 100 // 4 + 4 + 125,
    "compose_block_stochastic": 64 + 4 + 48,
    "compose_unbiased": 300 + 4 + 8,
    "compose_dct_sign": 16 + 4 + 80,
    "compose_threshold_bf16": 200 + 125,
}


def sample(kind: str, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(size)
    match kind:
        case "gaussian":
            x = normal
        case "heavy":
            x = normal / np.abs(rng.standard_normal(size) + 1e-3) * 1e-4
        case "sparse":
            x = normal * (rng.random(size) < 0.02)
        case "one":
            x = -3.0 * (np.arange(size) == size // 2)
        case "constant":
            x = np.full(size, -2.5)
        case "equal":
            x = np.sign(normal)
        case "worst":  # just under half a step of the 4-bit grid below one large value
            x = np.where(np.arange(size) == 0, 1.0, 0.0624 * np.sign(normal))
        case "halves":  # natural compression's worst case
            x = np.full(size, 1.5)
        case "tiny":
            x = normal * 1e-33
        case "huge":
            x = normal * 1e29
        case "positive":
            x = np.abs(normal) + 10
        case _:
            x = np.zeros(size)
    return x.astype(np.float32)


KINDS = (
    *("gaussian", "heavy", "sparse", "one", "constant", "equal", "worst", "halves", "tiny"),
    *("huge", "positive", "zeros"),
)


@functools.cache
def _measured(name: str):
    """One compiled program a codec, over all sizes: compiling is what these tests cost."""
    c = TABLE[name]
    random = c.omega(9) is not None or name == "rand_k"

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def program(xs, keys):
        def both(v, k):
            payload = c.encode(v, k)
            return c.decode(payload, v.shape[0]), payload

        over_keys = jax.vmap(jax.vmap(both, (None, 0)), (0, None))
        return {size: over_keys(x, keys[: seeds(size)]) for size, x in xs.items()}

    seeds = lambda size: 64 if size > 9 else 1024 if random else 8
    xs = {size: np.stack([sample(kind, size) for kind in KINDS]) for size in SIZES}
    return xs, program(xs, jax.random.split(jax.random.key(1), 1024))


def measured(name: str, size: int):
    """x (kinds, d) and, over 8 to 1024 keys, decoded vectors (kinds, keys, d) and payloads."""
    xs, results = _measured(name)
    y, payload = results[size]
    return xs[size].astype(np.float64), np.asarray(y, np.float64), payload


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TABLE)
class TestEveryCompressor:
    def test_payload_is_what_it_says(self, name, size):
        c = TABLE[name]
        _, y, payload = measured(name, size)
        assert y.shape[2:] == (size,)
        shapes = c.payload_shapes(size)
        assert {n: (p.shape[2:], p.dtype) for n, p in payload.items()} == {
            n: (s.shape, s.dtype) for n, s in shapes.items()
        }
        assert "values" in payload
        nbytes = sum(np.asarray(p[0, 0]).nbytes for p in payload.values())
        assert c.payload_bytes(size) == nbytes
        if size == 1000:
            assert nbytes == BYTES_OF_1000[name]
        for part in payload.values():
            assert part.ndim == 3, "payload parts are vectors"
            assert part.dtype in (jnp.uint8, jnp.uint16, jnp.uint32, jnp.float32)

    def test_zeros_are_exact_and_nothing_is_lost_to_nan(self, name, size):
        _, y, _ = measured(name, size)
        assert np.isfinite(y).all()
        assert (y[KINDS.index("zeros")] == 0).all()

    def test_constants_hold(self, name, size):
        """E||C(v) - v||^2 against (1 - alpha)||v||^2 or omega ||v||^2, 4 sigma of the mean."""
        x, y, _ = measured(name, size)
        norm = (x**2).sum(-1)
        errors = ((y - x[:, None]) ** 2).sum(-1)
        mean, slack = errors.mean(1), 4 * errors.std(1) / np.sqrt(y.shape[1])
        alpha, omega = TABLE[name].alpha(size), TABLE[name].omega(size)
        if alpha is not None:
            assert 0 < alpha <= 1
            over = mean - ((1 - alpha) * (1 + 1e-5) + 1e-12) * norm - slack
            assert (over <= 0).all(), dict(zip(KINDS, (mean / np.maximum(norm, 1e-99)))) | {
                "": alpha
            }
        if omega is not None:
            over = mean - (omega * (1 + 1e-5) + 1e-12) * norm - slack
            assert (over <= 0).all(), dict(zip(KINDS, (mean / np.maximum(norm, 1e-99)))) | {
                "": omega
            }

    def test_unbiased_where_omega_is_given(self, name, size):
        """||mean of y - x||^2 against its expectation E||y - x||^2 / seeds (chi^2 of 1: < 30)."""
        c = TABLE[name]
        if c.omega(size) is None:
            return
        x, y, _ = measured(name, size)
        bias = ((y.mean(1) - x) ** 2).sum(-1)
        variance = ((y - x[:, None]) ** 2).sum(-1).mean(1) / y.shape[1]
        norm = (x**2).sum(-1)
        assert (bias <= 30 * variance + 1e-12 * norm).all(), dict(zip(KINDS, bias / variance))
        if size == 1000 and not c.shared_key:  # independent coordinates: the ratio is near 1
            for kind in map(KINDS.index, ("gaussian", "equal", "positive", "halves")):
                assert bias[kind] <= 1.4 * variance[kind] + 1e-12 * norm[kind], KINDS[kind]
