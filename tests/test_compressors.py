"""Every compressor: shapes, bytes, constants, zeros; over sizes, distributions and seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm import compressors as C

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
        case "constant":
            x = np.full(size, -2.5)
        case "equal":
            x = np.sign(normal)
        case "tiny":
            x = normal * 1e-30
        case _:
            x = np.zeros(size)
    return x.astype(np.float32)


KINDS = ("gaussian", "heavy", "sparse", "constant", "equal", "tiny", "zeros")


@functools.cache
def roundtrips(name: str, size: int):
    """All distributions (rows) and two seeds through one compiled program."""
    c = TABLE[name]

    @jax.jit
    def program(x, keys):
        return jax.vmap(lambda v: jax.vmap(lambda k: c.roundtrip(v, k))(keys))(x)

    x = np.stack([sample(kind, size) for kind in KINDS])
    return x, np.asarray(program(x, jax.random.split(jax.random.key(1), 16)))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("size", SIZES)
class TestEveryCompressor:
    def test_payload_is_what_it_says(self, name, size):
        c = TABLE[name]
        payload = c.encode(jnp.asarray(sample("gaussian", size)), jax.random.key(0))
        assert "values" in payload
        assert c.payload_bytes(size) == sum(np.asarray(p).nbytes for p in payload.values())
        for part in payload.values():
            assert part.dtype in (jnp.uint8, jnp.uint16, jnp.uint32, jnp.float32)
            assert part.ndim == 1

    def test_constants_hold(self, name, size):
        x, y = roundtrips(name, size)
        assert np.isfinite(y).all()
        norm = (x.astype(np.float64) ** 2).sum(-1)
        error = ((y - x[:, None].astype(np.float64)) ** 2).sum(-1)
        alpha, omega = TABLE[name].alpha(size), TABLE[name].omega(size)
        assert (y[KINDS.index("zeros")] == 0).all()
        if alpha is not None:
            assert 0 < alpha <= 1
            bound = (1 - alpha) * norm[:, None] * (1 + 1e-5) + 1e-12 * norm[:, None]
            assert (error <= bound).all(), (error / np.maximum(norm[:, None], 1e-300), alpha)
        del omega
