"""The ring keeps replicas bit-identical under quantization; what breaks it without its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxcomm.collectives import exchange_bytes, ring_mean
from jaxcomm.compressors import identity, quantize, rand_k, sign, top_k
from jaxcomm.traffic import count

UINT8 = quantize(8, block_size=None, scheme="minmax")  # the quantizer of the paper's library


def vectors(n: int, size: int) -> np.ndarray:
    scale = np.random.default_rng(n).lognormal(size=(n, 1))
    return (np.random.default_rng(size).normal(size=(n, size)) * scale).astype(np.float32)


def on_devices(fn, n: int):
    """fn per worker on n devices; every result with the leading axis n."""
    mesh = Mesh(np.array(jax.devices()[:n]), ("ring",), axis_types=(AxisType.Auto,))
    body = lambda x: jax.tree.map(lambda y: y[None], fn(x[0]))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("ring"), out_specs=P("ring")))


def reference(x: np.ndarray, codec) -> np.ndarray:
    """The ring in plain loops: what worker r sends is the partial sum of chunk r - hop."""
    n, size = x.shape
    length = -(-size // n)
    padded = np.pad(x, ((0, 0), (0, n * length - size))).reshape(n, n, length)
    real = [min(max(size - c * length, 0), length) for c in range(n)]
    mean = np.zeros((n, length), np.float32)
    for chunk in range(n):
        partial = padded[chunk, chunk]
        for hop in range(n):  # workers chunk, chunk + 1, ..., the last one owns it
            partial[real[chunk] :] = 0
            coded = np.asarray(codec.roundtrip(jnp.asarray(partial)))
            partial = coded + padded[(chunk + hop + 1) % n, chunk]
        mean[chunk] = coded / n
    return mean.reshape(-1)[:size]


@pytest.mark.parametrize("n", range(2, 8))
def test_replicas_have_the_same_bits(n):
    sizes = (1003, n - 1, 1)  # unequal chunks; fewer elements than workers; one element

    def both(x):
        run = lambda size, **how: ring_mean(x[:size], UINT8, "ring", **how).mean
        return {s: (run(s), run(s, forward="ring")) for s in sizes}

    x = vectors(n, 1003)
    for size, (gathered, relayed) in on_devices(both, n)(x).items():
        gathered, relayed = np.asarray(gathered), np.asarray(relayed)
        assert gathered.shape == (n, size)
        for r in range(1, n):
            np.testing.assert_array_equal(gathered[r], gathered[0])
            np.testing.assert_array_equal(relayed[r], relayed[0])
        # two programs: the compiler may round a multiply-add once or twice
        np.testing.assert_allclose(relayed, gathered, rtol=0, atol=1e-6)
        exact = x[:, :size].mean(0)
        step = np.ptp(np.cumsum(x, 0)) / 255 / n  # at most half of it lost in each of n codings
        np.testing.assert_allclose(gathered[0], exact, atol=n * step)


def test_without_the_replace_rule_replicas_differ():
    x = vectors(5, 1003)

    def both(x):
        keep = lambda replace: ring_mean(x, UINT8, "ring", forward="ring", replace=replace).mean
        return keep(True), keep(False)

    replaced, kept = map(np.asarray, on_devices(both, 5)(x))
    assert all(np.array_equal(replaced[r], replaced[0]) for r in range(5))
    differing = [np.flatnonzero(kept[r] != replaced[r]) for r in range(5)]
    for r, where in enumerate(differing):  # each worker is alone with the chunk that it owns
        chunk = (r + 1) % 5
        assert where.size > 100
        assert where.min() >= chunk * 201
        assert where.max() < min((chunk + 1) * 201, 1003)
    error = np.linalg.norm(replaced[0] - x.mean(0)) / np.linalg.norm(x.mean(0))
    assert 0.001 < error < 0.03  # of the order of the 0.0105 of the specification


@pytest.mark.parametrize("codec", [UINT8, sign(), top_k(0.1)], ids=["uint8", "sign", "top_k"])
def test_equals_the_plain_loop(codec):
    x = vectors(4, 397)
    run = jax.jit(jax.vmap(lambda x: ring_mean(x, codec, "ring").mean, axis_name="ring"))
    want = reference(x, codec) if codec != sign() else reference_sign(x)
    np.testing.assert_allclose(run(x)[2], want, rtol=1e-5, atol=1e-5)


def reference_sign(x):
    """The loop above with a scale that leaves out the padding of the last chunk."""

    class Codec:
        def roundtrip(self, v):
            real = max(int(np.count_nonzero(v)), 1)
            return np.where(np.asarray(v) < 0, -1, 1) * np.float32(np.abs(v).sum() / real)

    return reference(x, Codec())


@pytest.mark.parametrize("forward", ["gather", "ring"])
def test_bytes_are_those_of_the_formula(forward):
    for size, n in ((1003, 5), (3, 5), (10_000, 8)):
        x = jax.ShapeDtypeStruct((size,), jnp.float32)
        run = lambda x: ring_mean(x, UINT8, "ring", forward=forward).mean
        sent = sum(c.sent_bytes for c in count(run, x, axis_sizes={"ring": n}))
        length = -(-size // n)
        assert sent == 2 * (n - 1) * (length + 8)  # codes, and float32 scale and offset
        assert sent == exchange_bytes("ring", UINT8, size, n)


def test_losses_are_accounted_for():
    """What all workers sent has exactly the mean that all workers got."""
    x = vectors(6, 500)
    codecs = (sign(), rand_k(0.2), quantize(4, rounding="stochastic"))

    def run(x):
        return [ring_mean(x, codec, "ring", jax.random.key(3)) for codec in codecs]

    for result in jax.jit(jax.vmap(run, axis_name="ring"))(x):
        np.testing.assert_allclose(result.sent.mean(0), result.mean[0], rtol=1e-4, atol=1e-5)


def test_identity_is_the_mean_and_one_worker_is_alone():
    x = vectors(7, 20)
    run = lambda codec: jax.jit(jax.vmap(lambda x: ring_mean(x, codec, "ring"), axis_name="ring"))
    result = run(identity())(x)
    np.testing.assert_allclose(result.mean[3], x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.sent, x, atol=1e-6)
    alone = run(sign())(x[:1]).mean
    np.testing.assert_allclose(alone[0], sign().roundtrip(jnp.asarray(x[0])), rtol=1e-6)


def test_unknown_forward():
    with pytest.raises(ValueError, match=r"forward must be one of .* got 'back'"):
        ring_mean(jnp.zeros(3), sign(), "ring", forward="back")
