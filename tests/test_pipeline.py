"""PipelinedMean: the values, bytes and places of the plain exchange, in programs that are apart."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomm
from experiments import cluster
from jaxcomm.collectives import exchange_bytes, exchange_mean
from jaxcomm.training import distributed, pipeline
from tests import common

N = 4
CODECS = {
    "sign": jaxcomm.sign(),
    "sign block": jaxcomm.sign(block_size=64),
    "block_top_k": jaxcomm.block_top_k(0.1, block_size=64),
    "stochastic": jaxcomm.quantize(4, rounding="stochastic"),
    "rand_k": jaxcomm.rand_k(0.1),
    "bf16": jaxcomm.cast("bf16"),
}
PAIRS = (
    *(("sign", "two_phase"), ("sign block", "two_phase"), ("stochastic", "two_phase")),
    *(("sign block", "gather"), ("block_top_k", "gather"), ("rand_k", "gather")),
    *(("bf16", "two_phase"), ("bf16", "gather")),
)
KEY = 3


def vectors(size, n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32)


def plain(x, codec, exchange, bucket_bytes, mesh, names=common.AXIS):
    """The same mean as one program; keys as every transform draws them."""

    def fn(x):
        key = jax.random.key(KEY)
        if not codec.shared_key:
            key = jax.random.fold_in(key, jaxcomm.collectives.index(names))
        return exchange_mean(x[0], codec, names, key, exchange, bucket_bytes=bucket_bytes).mean

    run = jax.shard_map(fn, mesh=mesh, in_specs=P(names), out_specs=P())
    return np.asarray(jax.jit(run)(x).addressable_data(0))


@pytest.mark.parametrize(("name", "exchange"), PAIRS)
def test_values_are_those_of_the_plain_exchange(name, exchange):
    mesh, codec, x = common.mesh(N), CODECS[name], vectors(1003)
    mean = jaxcomm.PipelinedMean(codec, common.AXIS, exchange=exchange, buckets=3, mesh=mesh)
    assert mean.bucket_bytes(1003) < 4 * 1003
    got = mean(x, jax.random.key(KEY))
    assert got.sharding == NamedSharding(mesh, P())
    want = plain(x, codec, exchange, mean.bucket_bytes(1003), mesh)
    np.testing.assert_array_equal(got, want)
    shards = [np.asarray(shard.data) for shard in got.addressable_shards]
    assert all(shard.tobytes() == shards[0].tobytes() for shard in shards)


@pytest.mark.parametrize("exchange", ["two_phase", "gather"])
def test_transfers_on_other_devices(exchange):
    """As for accelerators: the collectives run on devices beside the computing ones."""
    devices = jax.devices()
    mesh, wire = (
        Mesh(np.array(some), (common.AXIS,), axis_types=(AxisType.Auto,))
        for some in (devices[:N], devices[N:])
    )
    x, codec = vectors(640), jaxcomm.sign()
    options = {"exchange": exchange, "buckets": 2, "mesh": mesh}
    mean = jaxcomm.PipelinedMean(codec, common.AXIS, wire=wire, **options)
    got = mean(x)
    assert set(got.devices()) == set(devices[:N])
    np.testing.assert_array_equal(got, plain(x, codec, exchange, mean.bucket_bytes(640), mesh))


def test_two_axes_are_one():
    mesh, names, x = common.mesh((2, 2), ("a", "b")), ("a", "b"), vectors(100)
    mean = jaxcomm.PipelinedMean(jaxcomm.sign(), names, buckets=2, mesh=mesh)
    want = plain(x, jaxcomm.sign(), "two_phase", mean.bucket_bytes(100), mesh, names)
    np.testing.assert_array_equal(mean(x), want)


def test_trees_keep_shapes_and_dtypes():
    one = common.tree(jnp.bfloat16)
    many = jax.tree.map(lambda x: jnp.stack([x * (i + 1) for i in range(N)]), one)
    mean = jaxcomm.PipelinedMean(jaxcomm.cast("bf16"), common.AXIS, buckets=2, mesh=common.mesh(N))
    got = mean(many)
    assert common.kinds(got) == common.kinds(one)
    expected = jax.tree.map(lambda x: x.astype(jnp.float32).mean(0), many)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.02)
    assert common.kinds(mean({"w": jnp.ones((N, 2, 5))})) == {"w": ((2, 5), jnp.float32)}
    assert mean({"none": jnp.ones((N, 0))})["none"].shape == (0,)


def test_the_argument_is_not_touched():
    x = jax.device_put(vectors(64), NamedSharding(common.mesh(N), P(common.AXIS)))
    before = np.asarray(x)
    mean = jaxcomm.PipelinedMean(jaxcomm.sign(), common.AXIS, mesh=common.mesh(N))
    first, second = mean(x), mean(x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(before, x)


@pytest.mark.parametrize("exchange", ["two_phase", "gather"])
@pytest.mark.parametrize(
    "size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 1003)), 100_000]
)
def test_bytes_are_counted(size, exchange):
    """What the collectives move, by the shapes of their messages, is what is foretold."""
    codec = CODECS["sign block"]
    mean = jaxcomm.PipelinedMean(codec, common.AXIS, exchange=exchange, mesh=common.mesh(N))
    sent, transfer = [], mean._transfer

    def note(message, hop, place):
        to = N if place.name == "REPLICATED" else 1  # a row to each worker, or all to all of them
        sent.append((N - 1) / N * to * message.nbytes / N)
        return transfer(message, hop, place)

    mean._transfer = note
    mean(vectors(size))
    hops = 2 if exchange == "two_phase" else 1
    assert len(sent) == hops * min(8, -(-size // (32 if hops == 2 else 8)))
    bucket = mean.bucket_bytes(size)
    assert sum(sent) == mean.sent_bytes(size) == exchange_bytes(exchange, codec, size, N, bucket)


def test_buckets_are_whole_blocks_where_they_are_large():
    mean = jaxcomm.PipelinedMean(jaxcomm.sign(), common.AXIS, exchange="gather", buckets=8)
    assert mean.bucket_bytes(10_000_000) == 4 * 1221 * 1024
    assert mean.bucket_bytes(1000) == 4 * 128
    assert mean.bucket_bytes(3) == 4 * 8


def test_collectives_and_computation_are_programs_apart():
    mean = jaxcomm.PipelinedMean(jaxcomm.sign(), common.AXIS, buckets=2, mesh=common.mesh(N))
    x = vectors(640)
    mean(x)
    ((steps, at), *_) = next(iter(mean._plans.values())).parts
    message = steps.encode(x, None, *at)
    received = steps.send(message)
    averaged = steps.average(received, None, *at)
    texts = {
        "encode": steps.encode.lower(x, None, *at).as_text(),
        "average": steps.average.lower(received, None, *at).as_text(),
        "send": steps.send.lower(message).as_text(),
        "gather": steps.gather.lower(averaged).as_text(),
    }
    collective = lambda text: "all_to_all" in text or "all_gather" in text
    assert {name for name, text in texts.items() if collective(text)} == {"send", "gather"}
    wire = [
        texts[name].count('all_to_all"(') + texts[name].count('all_gather"(')
        for name in ("send", "gather")
    ]
    assert wire == [1, 1]  # a hop is one message, however many parts the payload has


def test_nothing_is_traced_twice():
    mean = jaxcomm.PipelinedMean(jaxcomm.sign(), common.AXIS, buckets=3, mesh=common.mesh(N))
    mean(vectors(1003))
    plan = next(iter(mean._plans.values()))
    before = [steps.encode._cache_size() for steps, _ in plan.parts]
    mean(vectors(1003, seed=1))
    assert len(mean._plans) == 1
    assert [steps.encode._cache_size() for steps, _ in plan.parts] == before
    assert len({id(steps) for steps, _ in plan.parts}) <= 2  # the last bucket may be shorter


def test_what_makes_no_sense_is_refused():
    make = jaxcomm.PipelinedMean
    with pytest.raises(TypeError, match="PipelinedMean: compressor must be"):
        make("workers", jaxcomm.sign())
    with pytest.raises(ValueError, match=r"exchange must be one of .* got 'ring'"):
        make(jaxcomm.sign(), common.AXIS, exchange="ring")
    with pytest.raises(ValueError, match="buckets must be at least 1, got 0"):
        make(jaxcomm.sign(), common.AXIS, buckets=0)
    with pytest.raises(ValueError, match="mesh of the worker axes alone, got the axes 'a', 'b'"):
        make(jaxcomm.sign(), "a", mesh=common.mesh((2, 2), ("a", "b")))
    with pytest.raises(ValueError, match="wire needs the axes of mesh and its processes"):
        make(jaxcomm.sign(), common.AXIS, mesh=common.mesh(4), wire=common.mesh(2))
    mean = make(jaxcomm.sign(), common.AXIS, mesh=common.mesh(N))
    with pytest.raises(ValueError, match=r"axis 0 .* is the 4 workers', got the shape \(3, 2\)"):
        mean({"w": jnp.ones((3, 2))})
    with pytest.raises(TypeError, match="only floating-point leaves"):
        mean({"w": jnp.ones((N, 2), jnp.int32)})
    with pytest.raises(ValueError, match="natural is random: encode"):
        make(jaxcomm.natural(), common.AXIS, mesh=common.mesh(N))(vectors(16))


def test_an_accelerator_needs_cpu_devices(monkeypatch):
    class Device:
        platform, process_index = "tpu", 0

    mesh = type("", (), {"devices": np.array([Device(), Device()], dtype=object)})
    mesh.axis_names = (common.AXIS,)
    cpus = jax.devices()
    monkeypatch.setattr(pipeline.jax, "devices", lambda kind: cpus[:1])
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=2"):
        pipeline._on_hosts(mesh)
    monkeypatch.setattr(pipeline.jax, "devices", lambda kind: cpus)
    assert list(pipeline._on_hosts(mesh).devices) == cpus[:2]


def means(n: int, devices) -> dict[str, np.ndarray]:
    """Of several kinds, what this process's first device has."""
    mesh = Mesh(np.array(devices), (common.AXIS,), axis_types=(AxisType.Auto,))
    spread, rows = NamedSharding(mesh, P(common.AXIS)), vectors(1003, n, seed=7)
    x = jax.make_array_from_callback(rows.shape, spread, lambda where: rows[where])
    found = {}
    for name, exchange in (("sign", "two_phase"), ("block_top_k", "gather")):
        options = {"exchange": exchange, "buckets": 3, "mesh": mesh}
        mean = jaxcomm.PipelinedMean(CODECS[name], common.AXIS, **options)
        result = mean({"w": x})["w"]
        found[name] = np.asarray(result.addressable_data(0))
    return found


@pytest.mark.slow
def test_processes_agree_with_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    job = cluster.Job(("-m", "tests.test_pipeline", str(tmp_path)), 2, timeout=300)
    report = cluster.launch(job)
    assert report.outcome.exit_code == 0, report.outcome
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2)]
    for name, value in means(2, jax.devices()[:2]).items():
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name], err_msg=name)
        np.testing.assert_allclose(ranks[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def main(folder: str) -> None:
    """One process of the job."""
    jax.config.update("jax_num_cpu_devices", 1)
    assert distributed.initialize()
    found = means(jax.process_count(), jax.devices())
    np.savez(Path(folder) / f"{jax.process_index()}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
