"""One entry point: bytes, choice, buckets, and error feedback through every exchange."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomm
from jaxcomm import collectives
from jaxcomm.collectives import choose_exchange, exchange_bytes, exchange_hops, exchange_mean
from jaxcomm.collectives.exchange import server_error_size
from jaxcomm.compressors import cast, compose, identity, quantize, rand_k, sign, top_k
from jaxcomm.traffic import count

N = 8
PAIR = ("fast", "slow")  # 4 x 2 workers
WAYS = ("gather", "two_phase", "ring", "dense", "hierarchical")
CODECS = (sign(), sign(block_size=64), top_k(0.01), quantize(8), cast("bf16"), identity())


def workers(fn):
    """fn(x) of 4 x 2 workers under nested vmap; x and the results have a leading axis 8."""
    both = jax.vmap(jax.vmap(fn, axis_name="slow"), axis_name="fast")
    split = lambda x: x.reshape(4, 2, *x.shape[1:])
    join = lambda x: x.reshape(8, *x.shape[2:])
    return jax.jit(lambda *args: jax.tree.map(join, both(*jax.tree.map(split, args))))


def vectors(size, seed=0):
    return np.random.default_rng(seed).normal(size=(N, size)).astype(np.float32)


# Bytes.


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("bucket", [None, 1600])
def test_predicted_bytes_are_those_of_the_program(codec, bucket):
    for size in (0, 1, 9, 1003):
        x = jax.ShapeDtypeStruct((size,), jnp.float32)
        for way in WAYS:
            pair = way == "hierarchical"
            sizes = {"fast": 4, "slow": 2} if pair else {"workers": N}
            run = functools.partial(
                exchange_mean,
                compressor=codec,
                axis_name=PAIR if pair else "workers",
                exchange=way,
                bucket_bytes=bucket,
            )
            found = count(lambda x, run=run: run(x), x, axis_sizes=sizes)
            predicted = exchange_bytes(way, codec, size, (4, 2) if pair else N, bucket)
            sent = sum(c.sent_bytes for c in found)
            np.testing.assert_allclose(sent, predicted, rtol=1e-12, err_msg=f"{way} {size}")


def test_hops_are_payloads():
    codec, size = quantize(4, block_size=100), 100_000
    shard = codec.payload_bytes(size // 4)
    first, slow, last = exchange_hops("hierarchical", codec, size, (4, 2))
    assert (first.axis, slow.axis, last.axis) == (0, 1, 0)
    assert slow.sent_bytes == shard  # one other worker across the slow axis: 1/4 of the vector
    assert first.sent_bytes == last.sent_bytes == 3 * 4 * size // 4
    assert exchange_bytes("gather", codec, size, N) == 7 * codec.payload_bytes(size)
    assert exchange_bytes("two_phase", codec, size, N) == 14 * codec.payload_bytes(size // N)
    assert exchange_bytes("dense", codec, size, N) == 2 * 7 / 8 * 4 * size
    with pytest.raises(ValueError, match=r"needs workers=\(fast, slow\), got 8"):
        exchange_hops("hierarchical", codec, size, 8)
    with pytest.raises(ValueError, match=r"exchange must be one of .* got 'pigeon'"):
        exchange_hops("pigeon", codec, size, 8)


# The choice.


def test_choice_by_bytes_and_latency():
    big = 10_000_000
    assert choose_exchange(sign(), big, N) == "two_phase"
    assert choose_exchange(sign(), big, 2) == "gather"  # the same bytes, half the messages
    assert choose_exchange(sign(), big, N, latency=1.0) == "gather"  # 7 messages against 14
    assert choose_exchange(sign(), big, 4096, candidates=("gather", "dense")) == "dense"
    assert choose_exchange(top_k(0.5), 100, N, latency=0, candidates=("dense", "gather")) == "dense"
    assert choose_exchange(top_k(k=100), 104, N, latency=0) in ("gather", "dense")
    links = {"latency": (1e-6, 1e-4), "bandwidth": (1e11, 1e8)}
    ways = ("gather", "two_phase", "hierarchical")
    assert choose_exchange(sign(), big, (8, 4), candidates=ways, **links) == "hierarchical"
    links["bandwidth"] = (1e8, 1e8)
    assert choose_exchange(sign(), big, (8, 4), candidates=ways, **links) == "two_phase"


@pytest.mark.parametrize(
    "codec", [rand_k(0.1, scaled=True), compose(rand_k(0.5), quantize(4))], ids=str
)
def test_random_masks_are_drawn_once(codec):
    """Two-phase and ring, cheaper here, would draw another one at each hop."""
    size, links = 10_000_000, {"latency": (1e-6, 1e-4), "bandwidth": (1e11, 1e8)}
    assert choose_exchange(codec, size, N) in ("gather", "dense")
    assert server_error_of("auto", codec, size) == 0
    slow = exchange_hops("hierarchical", codec, size, (2, N))[1:-1]
    assert [hop.collective for hop in slow] == ["all-gather"]
    ways = ("two_phase", "hierarchical")
    assert choose_exchange(codec, size, (2, N), candidates=ways, **links) == "hierarchical"
    assert choose_exchange(codec, size, N, candidates=ways[:1]) == "two_phase"  # asked for


def server_error_of(way, codec, size):
    """What `server_error_size` gives N workers, 0 for None."""
    run = lambda x: x + (server_error_size(way, codec, size, "workers") or 0)
    return jax.vmap(run, axis_name="workers")(jnp.zeros(N))[0]


def test_choice_that_is_impossible():
    with pytest.raises(ValueError, match=r"none of .*'two_phase',\) is possible: k must be"):
        choose_exchange(top_k(k=100), 104, N, candidates=("two_phase",))
    with pytest.raises(ValueError, match=r"bandwidth > 0, got latency=0\.0001, bandwidth=0"):
        choose_exchange(sign(), 10, N, bandwidth=0)


def test_auto_takes_place_and_shows(caplog):
    """The program is that of the choice, which its name scopes and one log line tell."""

    def program(way):
        fn = lambda x: exchange_mean(x, sign(), "workers", exchange=way).mean
        x = jnp.zeros((N, 50_000))
        return jax.jit(jax.vmap(fn, axis_name="workers")).lower(x).as_text(debug_info=True)

    with caplog.at_level(logging.INFO):
        auto = program("auto")
    chosen = choose_exchange(sign(), 50_000, N)
    assert set(re.findall(r"jaxcomm\.exchange\.(\w+)", auto)) == {chosen}
    assert f"exchange='auto': {chosen} for 50000 elements" in caplog.text


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"error_feedback: exchange must be one of .* 'fast'"):
        jaxcomm.error_feedback(sign(), "workers", exchange="fast")
    with pytest.raises(ValueError, match="compressed_average: bucket_bytes must be at least 4"):
        jaxcomm.compressed_average(sign(), "workers", bucket_bytes=3)
    run = lambda x: exchange_mean(x, sign(), "workers", exchange="hierarchical").mean
    with pytest.raises(ValueError, match=r"axis_name=\(fast axis, slow axis\), got 'workers'"):
        jax.vmap(run, axis_name="workers")(jnp.ones((2, 3)))


# Hierarchical.


def test_hierarchical_codes_the_means_of_groups():
    x, codec = vectors(1001), quantize(8, block_size=16)
    run = workers(lambda x: exchange_mean(x, codec, PAIR, exchange="hierarchical"))
    result = run(x)
    groups = x.reshape(4, 2, 1001).mean(0)  # of the workers along the fast axis
    padded = np.pad(groups, ((0, 0), (0, 3))).reshape(2, 4, 251)  # a shard for each of them
    coded = jax.vmap(jax.vmap(codec.roundtrip))(jnp.asarray(padded)).mean(0)
    np.testing.assert_allclose(result.mean[5], coded.reshape(-1)[:1001], atol=0.02)
    assert all(np.array_equal(result.mean[r], result.mean[0]) for r in range(N))
    np.testing.assert_allclose(result.sent.mean(0), result.mean[0], atol=1e-5)


def test_hierarchical_takes_the_ring_where_it_sends_less():
    """Eight pods: a ring of 2 * 7/8 payloads instead of 7."""
    run = lambda x: exchange_mean(x, sign(), PAIR, exchange="hierarchical").mean
    found = count(run, jnp.zeros(10_000), axis_sizes={"fast": 2, "slow": 8})
    assert {c.op for c in found if c.axes == ("slow",)} == {"permute", "all-gather"}
    sent = sum(c.sent_bytes for c in found)
    assert sent == exchange_bytes("hierarchical", sign(), 10_000, (2, 8))


# Buckets.


@pytest.mark.parametrize("way", ["gather", "two_phase", "ring", "dense", "hierarchical"])
def test_buckets_change_nothing_for_a_codec_without_scales(way):
    x = vectors(203)
    memory = vectors(-(-203 // N), seed=1)
    run = lambda bucket: workers(
        lambda x, memory: exchange_mean(
            x, cast("bf16"), PAIR, exchange=way, server_error=memory, bucket_bytes=bucket
        )
    )
    whole = run(None)(x, memory)
    for bucket in (4 * 64, 4 * 202, 10**9):  # 4, 2 and 1 buckets; the last one short
        parts = run(bucket)(x, memory)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            np.testing.assert_allclose(a, b, rtol=0.01, atol=0.05)
            if way in ("gather", "two_phase"):  # but for a mean that may round to either side
                assert np.mean(np.asarray(a) != b) < 0.02


def test_number_of_buckets():
    shape = jax.ShapeDtypeStruct((1003,), jnp.float32)
    for way, ops in (("gather", 1), ("two_phase", 2), ("dense", 1)):
        run = lambda x, bucket, way=way: exchange_mean(
            x, cast("bf16"), "workers", exchange=way, bucket_bytes=bucket
        )
        for bucket, buckets in ((None, 1), (4 * 1003, 1), (4 * 400, 3), (4 * 1002, 2)):
            found = count(functools.partial(run, bucket=bucket), shape, axis_sizes={"workers": N})
            if way == "two_phase":  # whole columns of 8 workers: 126 in all
                buckets = -(-126 // (bucket // 4 // N)) if bucket else 1
            assert len(found) == buckets * ops, (way, bucket)


def test_collectives_do_not_grow_with_leaves():
    """Counted in the program, for 10 and for 1,000 leaves of the same 3,000 parameters."""

    def collectives_of(leaves, way, bucket):
        tree = {f"{i}": jnp.zeros((3000 // leaves,)) for i in range(leaves)}
        tx = jaxcomm.error_feedback(sign(), "workers", exchange=way, bucket_bytes=bucket)

        def run(tree):
            return tx.update(tree, tx.init(tree))

        return [c.op for c in count(run, tree, axis_sizes={"workers": N})]

    for way in ("gather", "two_phase", "ring", "dense"):
        few = collectives_of(10, way, None)
        assert few == collectives_of(1000, way, None)
        assert len(few) <= 4  # values and scales, there and back
    assert collectives_of(10, "gather", 4000) == collectives_of(1000, "gather", 4000)
    assert len(collectives_of(10, "gather", 4000)) == 3 * 2


# Error feedback through every exchange.


def telescope(codec, way, steps, bucket=None, decay=1.0, size=203):
    """Relative error of  sum of outputs + remaining errors = sum of inputs."""
    tx = jaxcomm.error_feedback(codec, PAIR, exchange=way, bucket_bytes=bucket)

    def run(key):
        me = collectives.index(PAIR)
        scale = 1.0 + me

        def step(state, key):
            grad = scale * jax.random.normal(jax.random.fold_in(key, me), (size,)) + 0.1
            update, state = tx.update({"w": grad}, state)
            return state, (grad, update["w"])

        state, (grads, updates) = jax.lax.scan(
            step, tx.init({"w": jnp.zeros(size)}), jax.random.split(key[0], steps)
        )
        return grads, updates, state

    keys = jnp.broadcast_to(jax.random.key(1), (N, 1))
    grads, updates, state = jax.tree.map(lambda x: np.asarray(x, np.float64), workers(run)(keys))
    remaining = state.error["w"].mean(0)
    if state.server_error is not None:
        remaining = remaining + state.server_error.reshape(-1)[:size]
    total = grads.mean(0).sum(0)
    assert np.abs(remaining).max() > 1e-3  # something was held back
    return np.linalg.norm(updates[0].sum(0) + remaining - total) / np.linalg.norm(total)


@pytest.mark.parametrize("bucket", [None, 4 * 64])
def test_two_phase_telescopes_over_a_thousand_steps(bucket):
    assert telescope(sign(), "two_phase", 1000, bucket) < 1e-4


@pytest.mark.parametrize("way", ["gather", "ring", "hierarchical"])
def test_every_exchange_telescopes(way):
    assert telescope(sign(), way, 200) < 1e-4


def test_a_shared_key_needs_no_place_on_the_worker():
    """The seed in the payload is the same on all workers: vmap does not map over it."""
    x = vectors(26)
    run = lambda x: exchange_mean(x, rand_k(1.0), PAIR, jax.random.key(0), "two_phase").mean
    np.testing.assert_allclose(workers(run)(x)[3], x.mean(0), rtol=1e-5, atol=1e-6)


def test_state_does_not_depend_on_buckets():
    params = {"w": jnp.zeros((7, 29)), "b": jnp.zeros(())}

    def shapes(bucket, way):
        tx = jaxcomm.error_feedback(sign(), "workers", exchange=way, bucket_bytes=bucket)
        init = lambda _: tx.init(params)
        return jax.eval_shape(jax.vmap(init, axis_name="workers", axis_size=N), jnp.zeros(N))

    for way in ("gather", "two_phase", "auto"):
        assert shapes(None, way) == shapes(100, way)
    assert shapes(None, "two_phase").server_error.shape == (N, 26)
    size = lambda way: server_error_of(way, sign(), 10**7)
    assert size("auto") == size("two_phase") == 10**7 / N
    assert size("gather") == 0
