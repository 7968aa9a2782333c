"""Primitives, flattening and means: the same in every mode, for every size, type and tree."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcomm
from jaxcomm import collectives
from jaxcomm.collectives import primitives
from jaxcomm.collectives.axis import axes, varying_axes
from jaxcomm.compressors import cast, quantize, rand_k, sign, top_k
from tests import common

N = 8
PAIR = ("fast", "slow")  # 4 x 2 workers, in row-major order
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int8, jnp.uint8, jnp.bool_)


def over(mode: str, fn):
    """`fn(x, axis_name)` for each row of (8, ...) inputs: results with a leading axis 8."""
    if mode == "vmap":
        return jax.jit(jax.vmap(lambda x: fn(x, "workers"), axis_name="workers"))
    if mode == "pmap":
        return jax.pmap(lambda x: fn(x, "workers"), axis_name="workers")
    if mode == "nested vmap":
        inner = jax.vmap(lambda x: fn(x, PAIR), axis_name="slow")
        both = jax.vmap(inner, axis_name="fast")
        split = lambda x: x.reshape(4, 2, *x.shape[1:])
        join = lambda x: x.reshape(8, *x.shape[2:])
        return jax.jit(lambda x: jax.tree.map(join, both(jax.tree.map(split, x))))
    names = "workers" if mode == "shard_map" else PAIR
    mesh = common.mesh(8) if mode == "shard_map" else common.mesh((4, 2), PAIR)
    one = lambda tree: jax.tree.map(lambda x: x[0], tree)
    body = lambda x: jax.tree.map(lambda y: y[None], fn(one(x), names))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(names), out_specs=P(names)))


MODES = ("vmap", "shard_map", "pmap", "nested vmap", "mesh of two axes")


def every_primitive(x, name):
    """All primitives on all dtypes; x holds small integers."""
    out = {}
    for dtype in DTYPES:
        y = x.astype(dtype)
        out[jnp.dtype(dtype).name] = {
            "sum": primitives.all_sum(y, name),
            "max": primitives.all_max(y, name),
            "gather": primitives.all_gather(y, name),
            "all_to_all": primitives.all_to_all(y, name),
            "scatter": primitives.scatter_sum(y, name),
            "ahead": primitives.shift(y, name),
            "back": primitives.shift(y, name, -3),
            "stay": primitives.shift(y, name, N),
        }
    same = jnp.arange(2.0 * N).reshape(N, 2)  # replicated: vmap does not map over it
    out["replicated"] = {
        "sum": primitives.all_sum(same[0], name),
        "max": primitives.all_max(same[0], name),
        "gather": primitives.all_gather(same[0], name),
        "all_to_all": primitives.all_to_all(same, name),
        "scatter": primitives.scatter_sum(same, name),
        "ahead": primitives.shift(same[0], name),
    }
    empty = x[:0]
    out["empty"] = {
        "sum": primitives.all_sum(empty, name),
        "max": primitives.all_max(empty, name),
        "gather": primitives.all_gather(empty, name),
        "all_to_all": primitives.all_to_all(x[:, :0], name),
    }
    return out


@pytest.mark.parametrize("mode", MODES)
def test_primitives(mode):
    x = np.random.default_rng(0).integers(0, 3, size=(N, N, 3)).astype(np.float32)
    everyone = lambda value: np.broadcast_to(value, (N, *value.shape))
    got = jax.tree.map(np.asarray, over(mode, every_primitive)(x))
    for dtype in DTYPES:
        found = got[jnp.dtype(dtype).name]
        y = np.asarray(jnp.asarray(x).astype(dtype))
        wide = y.astype(np.float32)
        narrow = not jnp.issubdtype(dtype, jnp.floating)
        want = {
            "sum": (everyone(wide.sum(0)), jnp.int32 if narrow else dtype),
            "max": (everyone(wide.max(0)), dtype),
            "gather": (everyone(wide), dtype),
            "all_to_all": (wide.swapaxes(0, 1), dtype),
            "scatter": (wide.sum(0), jnp.int32 if narrow else jnp.float32),
            "ahead": (np.roll(wide, 1, 0), dtype),
            "back": (np.roll(wide, -3, 0), dtype),
            "stay": (wide, dtype),
        }
        for op, (value, kind) in want.items():
            assert found[op].dtype == kind, (op, dtype)
            np.testing.assert_array_equal(found[op].astype(np.float32), value, err_msg=op)
    same = np.arange(2.0 * N).reshape(N, 2)
    for op, value in {
        "sum": everyone(N * same[0]),
        "max": everyone(same[0]),
        "gather": everyone(np.tile(same[0], (N, 1))),
        "all_to_all": np.repeat(same[:, None], N, 1),
        "scatter": N * same,
        "ahead": everyone(same[0]),
    }.items():
        np.testing.assert_array_equal(got["replicated"][op], value, err_msg=op)
    shapes = {op: value.shape for op, value in got["empty"].items()}
    assert shapes == {
        "sum": (8, 0, 3),
        "max": (8, 0, 3),
        "gather": (8, 8, 0, 3),
        "all_to_all": (8, 8, 0),
    }


def test_axis():
    def fn(x, name):
        return collectives.index(name) + 0 * x, jnp.int32(collectives.size(name)) + 0 * x

    for mode in MODES:
        index, size = over(mode, fn)(jnp.zeros(N, jnp.int32))
        assert index.tolist() == list(range(N))
        assert size.tolist() == [N] * N


def test_an_unbound_axis_is_named():
    with pytest.raises(ValueError, match=r"'rows' is not bound here \(axes in scope: none\)"):
        collectives.all_sum(jnp.ones(3), "rows")
    bad = lambda x, name: collectives.mean({"a": x}, "rows")
    for mode, scope in (("vmap", "'workers'"), ("nested vmap", "'(fast', 'slow|slow', 'fast)'")):
        with pytest.raises(ValueError, match=rf"'rows' is not bound .*in scope: {scope}\)"):
            over(mode, bad)(jnp.ones((N, 3)))
    with pytest.raises(ValueError, match="'slow' is not bound"):
        jax.vmap(lambda x: axes(PAIR) and x, axis_name="fast")(jnp.ones(2))


def test_axes_of_two_kinds_are_refused():
    inner = jax.vmap(lambda x: collectives.all_sum(x, ("rows", "columns")), axis_name="columns")
    mapped = jax.shard_map(inner, mesh=common.mesh(2, ("rows",)), in_specs=P("rows"), out_specs=P())
    with pytest.raises(ValueError, match="mixes axes of the mesh with axes that vmap simulates"):
        mapped(jnp.ones((4, 3)))


def test_results_are_typed_replicated():
    """JAX's own types: what everyone has is invarying, what a worker has is varying."""
    seen, results = {}, []

    def fn(x):
        x, tree = x[0], {"a": x[0], "b": jnp.ones(3), "empty": x[0, :0]}
        seen["sum"] = collectives.all_sum(x, PAIR)
        seen["max"] = collectives.all_max(x, PAIR)
        seen["gather"] = collectives.all_gather(x, PAIR)
        seen["tree"] = collectives.mean(tree, PAIR)
        seen["nothing"] = collectives.mean({}, PAIR)
        for size in (0, 1, 9):
            for way in ("gather", "two_phase", "ring", "dense", "hierarchical", "auto"):
                for bucket in (None, 8):
                    result = collectives.exchange_mean(
                        x[:size], sign(), PAIR, exchange=way, bucket_bytes=bucket
                    )
                    results.append(result.mean)
                    assert varying_axes(result.sent) == set(PAIR)
        replicated = jax.tree.leaves((seen, results))
        assert not any(varying_axes(leaf) for leaf in replicated)
        assert varying_axes(collectives.shift(x, PAIR)) == set(PAIR)
        assert varying_axes(collectives.all_sum(x, "fast")) == {"slow"}
        return replicated

    mesh = common.mesh((4, 2), PAIR)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P(PAIR), out_specs=P())
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((N, 9), jnp.float32))
    assert len(results) == 36


@pytest.mark.parametrize("codec", [cast("bf16"), cast("float8_e4m3fn"), sign()], ids=str)
def test_what_is_narrow_stays_narrow_on_the_wire(codec):
    """Operands of the collectives of the compiled program (XLA may widen and move casts)."""
    run = lambda x, name: [
        collectives.exchange_mean(x, codec, name, exchange=way).mean
        for way in ("gather", "two_phase", "ring")
    ]
    x = jax.ShapeDtypeStruct((N, 1000), jnp.float32)
    text = over("shard_map", run).lower(x).compile().as_text()
    ops = "all-gather|all-to-all|collective-permute"
    found = re.findall(rf"= \(?(\w+)\[([\d,]*)\].*? ({ops})\(", text)
    assert {op for _, _, op in found} == set(ops.split("|"))
    kinds = {kind for kind, shape, _ in found if _elements(shape) > N}  # less: float32 scales
    assert kinds == {"u16" if codec == cast("bf16") else "u8"}


def test_raw_narrow_arrays_too():
    run = lambda x, name: [
        primitives.all_gather(x.astype(kind), name) for kind in (jnp.bfloat16, jnp.float8_e5m2)
    ]
    x = jax.ShapeDtypeStruct((N, 1000), jnp.float32)
    text = over("shard_map", run).lower(x).compile().as_text()
    assert sorted(re.findall(r"= (\w+)\[8,1000\]\S* all-gather\(", text)) == ["u16", "u8"]


def _elements(shape: str) -> int:
    return int(np.prod([int(n) for n in shape.split(",") if n]))


# Flattening.


def leaves_of_every_kind():
    return {
        "scalar": jnp.float32(2.5),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "bf16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "fp8": jnp.ones((1, 1, 2), jnp.float8_e4m3fn),
        "list": [jnp.arange(5.0), None, ()],
    }


def test_flatten_round_trip():
    tree = leaves_of_every_kind()
    vector, unflatten = collectives.flatten(tree)
    assert vector.dtype == jnp.float32
    assert vector.shape == (14,)
    assert vector[:6].tolist() == [0, 1, 2, 3, 4, 5]  # in tree order: bf16 first
    back = unflatten(vector)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), tree, back)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(unflatten(vector, jnp.float32)))
    for nothing in ({}, {"a": jnp.zeros((0,))}):
        vector, unflatten = collectives.flatten(nothing)
        assert vector.shape == (0,)
        assert jax.tree.structure(unflatten(vector)) == jax.tree.structure(nothing)


def test_flatten_refuses_integers():
    tree = {"layer": [jnp.ones(2), jnp.arange(3)]}
    with pytest.raises(TypeError, match=r"got int32 at \['layer'\]\[1\]; leave it out with optax"):
        collectives.flatten(tree)


def test_trees_keep_shapes_and_dtypes():
    float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def fn(scale, name):
        tree = jax.tree.map(
            lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), leaves_of_every_kind()
        )
        tx = jaxcomm.error_feedback(quantize(8), name)
        return collectives.mean(tree, name), tx.update(tree, tx.init(tree))[0]

    scales = np.arange(N, dtype=np.float32) / 4
    want = jax.tree.map(lambda x: x * scales.mean(), float32(leaves_of_every_kind()))
    close = functools.partial(np.testing.assert_allclose, rtol=0.05, atol=0.02)
    for mode in ("vmap", "shard_map"):
        for got in over(mode, fn)(scales):
            one = jax.tree.map(lambda x: x[3], got)
            same = jax.tree.map(lambda a, b: a.dtype == b.dtype, one, leaves_of_every_kind())
            assert all(jax.tree.leaves(same))
            jax.tree.map(close, float32(one), want)


# Means against plain loops.

SIZES = (0, 1, 7, 8, 9, 1003)
WAYS = ("gather", "two_phase", "ring", "dense")


def gather_reference(x, roundtrip):
    return np.mean([roundtrip(v) for v in x], axis=0)


def two_phase_reference(x, roundtrip):
    n, size = x.shape
    length = -(-size // n)
    padded = np.pad(x, ((0, 0), (0, n * length - size))).reshape(n, n, length)
    out = [roundtrip(gather_reference(padded[:, chunk], roundtrip)) for chunk in range(n)]
    return np.concatenate(out)[:size]


@pytest.mark.parametrize("mode", MODES)
def test_means_equal_plain_loops(mode):
    """A codec without scales: the loops know nothing of padding."""
    x = np.random.default_rng(1).normal(size=(N, max(SIZES))).astype(np.float32)
    codec = cast("bf16")
    ways = (*WAYS, "hierarchical") if mode in MODES[3:] else WAYS
    sizes = SIZES if mode in MODES[:2] else (0, 1, 9)

    def fn(x, name):
        run = lambda size, way: collectives.exchange_mean(x[:size], codec, name, exchange=way)
        return {way: {size: run(size, way) for size in sizes} for way in ways}

    roundtrip = jax.jit(codec.roundtrip)
    results = over(mode, fn)(x)
    for size in sizes:
        part = x[:, :size]
        want = {
            "gather": gather_reference(part, roundtrip) if size else part[0],
            "two_phase": two_phase_reference(part, roundtrip) if size else part[0],
        }
        for way in ways:
            result = results[way][size]
            assert result.mean.shape == result.sent.shape == (N, size)
            assert all(np.array_equal(result.mean[r], result.mean[0]) for r in range(N))
            exact = way in want or way == "dense"
            np.testing.assert_allclose(
                result.mean[0],
                want.get(way, part.mean(0)),
                rtol=0.01 if way == "two_phase" else 1e-5,  # a mean may round to either side
                atol=1e-6 if exact else 0.02,
                err_msg=way,
            )
            # what was sent has the mean that came out, unless it was coded a second time
            if way != "two_phase":
                mean = np.asarray(result.sent).mean(0)
                np.testing.assert_allclose(mean, result.mean[0], atol=1e-5, err_msg=way)


def test_padding_has_no_weight():
    """9 elements on 8 workers: 4 full chunks, half a one, and 3 empty ones."""
    x = np.full((N, 9), 2.0, np.float32)
    run = lambda codec, way: lambda x, name: collectives.exchange_mean(x, codec, name, exchange=way)
    for codec in (sign(), sign(block_size=2), sign("l2")):
        for way in ("two_phase", "ring"):
            result = over("vmap", run(codec, way))(x)
            np.testing.assert_allclose(result.mean, 2.0, rtol=1e-6)
            np.testing.assert_allclose(result.sent, 2.0, rtol=1e-6)


def test_a_million_and_three():
    size = 10**6 + 3
    x = np.random.default_rng(0).normal(size=(N, size)).astype(np.float32)
    x[:, -3:] = 3.0  # the odd ones at the end arrive

    def fn(x, name):
        run = lambda way: collectives.exchange_mean(x, cast("bf16"), name, exchange=way).mean
        return {way: run(way)[-3:] for way in ("gather", "two_phase", "ring", "dense")}

    for way, tail in over("vmap", fn)(x).items():
        np.testing.assert_allclose(tail[0], 3.0, rtol=1e-2, err_msg=way)
    pair = jax.jit(lambda x: over("nested vmap", lambda x, name: _hierarchical(x, name)[-3:])(x))
    np.testing.assert_allclose(pair(x)[0], 3.0, rtol=1e-2)


def _hierarchical(x, name):
    return collectives.exchange_mean(x, cast("bf16"), name, exchange="hierarchical").mean


def test_random_codecs_draw_apart_and_together():
    """Own keys: the mean of unbiased messages is better than one; a shared seed: same places."""
    x = np.ones((N, 64), np.float32)

    def fn(x, name):
        own = jax.random.fold_in(jax.random.key(0), collectives.index(name))
        noisy = quantize(1, block_size=None, rounding="stochastic")
        together = jax.random.key(1)
        return (
            [collectives.gather_mean(x, noisy, name, key).mean for key in (own, together)],
            collectives.gather_mean(x, rand_k(k=5), name, together).mean,
        )

    x[:, 1:] = 0.0  # the scale is 1: all but the first are coded as +1 or -1, by a coin
    (apart, alike), kept = over("vmap", fn)(x)
    assert np.abs(alike[0, 1:]).tolist() == [1.0] * 63
    assert np.mean(apart[0, 1:] ** 2) < 0.3  # 1/8 in expectation
    assert np.count_nonzero(kept[0]) <= 5


def test_conditional_types_agree():
    """One branch communicates, the other does not: both come out with the union of types."""

    def fn(x, name):
        yes = lambda x: (collectives.all_sum(x, name), x)
        no = lambda x: (jnp.zeros_like(x), jnp.zeros_like(x))
        return [collectives.cond(jnp.bool_(flag), yes, no, x) for flag in (True, False)]

    x = np.arange(float(N), dtype=np.float32)
    for mode in ("vmap", "shard_map", "mesh of two axes"):
        (total, own), (none, nothing) = over(mode, fn)(x)
        assert total.tolist() == [28.0] * N
        assert own.tolist() == x.tolist()
        assert not none.any()
        assert not nothing.any()


def test_conditional_refuses_what_would_hang():
    communicate = lambda x: collectives.all_sum(x, "workers")

    def trace(pred, yes, no):
        fn = lambda x, name: collectives.cond(pred(x), yes, no, x)
        jax.eval_shape(over("shard_map", fn), jax.ShapeDtypeStruct((N, 2), jnp.float32))

    with pytest.raises(ValueError, match=r"differs between the workers of axis workers; agree on"):
        trace(lambda x: x[0] > 3, communicate, lambda x: x)
    trace(lambda x: collectives.all_max(x, "workers")[0] > 3, communicate, lambda x: x)
    with pytest.raises(ValueError, match="the branches return different trees"):
        trace(lambda x: jnp.bool_(True), communicate, lambda x: (x, x))


def test_top_k_counts_in_each_chunk():
    """What two_phase_mean's docstring says about sparse codecs."""
    x = np.random.default_rng(0).normal(size=(N, 800)).astype(np.float32)
    run = lambda codec: over("vmap", lambda x, name: collectives.two_phase_mean(x, codec, name))(x)
    result = run(top_k(0.05))
    assert np.count_nonzero(result.sent[0]) == 40
    assert (np.count_nonzero(result.mean[0].reshape(N, 100), axis=1) == 5).all()
