"""`bench scale` on tiny sizes; flattening trees of many leaves."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import bench, bench_scale, bench_scale_report, netns
from experiments.bench_scale_cases import (
    METHODS,
    Case,
    Link,
    alone_cases,
    layers_batch,
    layers_loss,
    link_cases,
    tree,
)
from experiments.rows import read_rows
from jaxcomm.collectives import flatten
from jaxcomm.collectives.flatten import __name__ as FLATTEN

SIZES = np.random.default_rng(0).integers(0, 4, 24).tolist()  # empty leaves as well


@pytest.fixture(params=["cpu", "gpu"])
def few(request, monkeypatch):
    """24 leaves are many, with either kind of fence."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(sys.modules[FLATTEN], "DIRECT", 4)
    monkeypatch.setattr(sys.modules[FLATTEN], "GROUP", 3)


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(size), jnp.float32) for size in SIZES]


def test_many_leaves_become_a_vector_and_come_back(few):
    params = [*_tree(), jnp.ones((2, 3), jnp.bfloat16)]

    def both_ways(params):
        vector, unflatten = flatten(params)
        return vector, unflatten(2 * vector)

    vector, doubled = jax.jit(both_ways)(params)
    expected = np.concatenate([np.asarray(x, np.float32).ravel() for x in params])
    np.testing.assert_array_equal(vector, expected)
    for x, twice in zip(params, doubled):
        assert (x.shape, x.dtype) == (twice.shape, twice.dtype)
        np.testing.assert_array_equal(2 * np.asarray(x), np.asarray(twice))
    slope = jax.jit(jax.grad(lambda p: jnp.sum(flatten(flatten(p)[1](flatten(p)[0]))[0] ** 2)))
    np.testing.assert_allclose(slope(params)[1], 2 * params[1], rtol=1e-6)


def test_many_leaves_the_same_in_every_mode(few):
    kind = (AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("w",), axis_types=kind)

    def body(varying, replicated):  # both kinds of leaves in one tree
        half = len(SIZES) // 2
        vector, unflatten = flatten(varying[:half] + replicated[half:])
        return [x[None] for x in unflatten(vector + 1)], flatten(replicated)[0]

    own = [jnp.stack([x + i for i in range(8)]) for x in _tree()]
    run = lambda own, shared: body([x[0] for x in own], shared)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P("w"), P()), out_specs=(P("w"), P()))
    back, vector = jax.jit(mapped)(own, _tree(1))
    simulated = jax.jit(jax.vmap(body, (0, None), (0, None)))(own, _tree(1))[0]
    for x, y in zip(back, simulated):
        np.testing.assert_array_equal(x, y[:, 0])
    np.testing.assert_array_equal(back[1], own[1] + 1)
    np.testing.assert_array_equal(back[-1][0], _tree(1)[-1] + 1)
    np.testing.assert_array_equal(vector, np.concatenate(_tree(1)))


def test_nothing_is_larger_than_infinity(few):
    params = [jnp.full(2, value) for value in (jnp.inf, jnp.nan, -jnp.inf) * 4]
    for x, y in zip(params, jax.jit(lambda p: flatten(p)[1](flatten(p)[0]))(params)):
        np.testing.assert_array_equal(x, y)


def test_the_cases():
    cases = alone_cases()
    assert {c.workers for c in cases if c.grows == "workers"} == {2**k for k in range(3, 11)}
    assert {c.parameters for c in cases if c.grows == "parameters"} == {10**k for k in range(5, 9)}
    assert {c.leaves for c in cases if c.grows == "leaves"} == {10**k for k in range(1, 5)}
    assert len(set(cases)) == len(cases)
    for leaves in (10, 1003):
        made = tree(12345, leaves)
        assert (len(made), sum(x.size for x in made.values())) == (leaves, 12345)
    assert bench.find("scale") is bench_scale


@pytest.mark.parametrize("leaves", [4, 40])
def test_layers_compute_as_much_in_few_leaves_as_in_many(leaves):
    """Each parameter is multiplied by each example."""
    case = Case("leaves", "none", 1, 64_000, leaves, examples=16)
    params, batch = tree(case.parameters, case.leaves), layers_batch(case)
    compiled = jax.jit(layers_loss, static_argnums=2).lower(params, batch, None).compile()
    operations = compiled.cost_analysis()["flops"]
    assert operations == pytest.approx(2 * case.examples * case.parameters, rel=0.1)
    slope = jax.grad(layers_loss)(params, batch, None)
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(slope))


@pytest.mark.slow
def test_cases_on_one_device_are_measured_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    cases = [Case("leaves", "ef21 block top-k", 2, 2000, n) for n in (10, 150)]
    cases += [Case("leaves", "none", 2, 2000, 10), Case("leaves", "none", 2, 2000, 10, 8)]
    cases += [Case("leaves", "sign two-phase, flattened", 2, 2000, 150)]
    large = Case("parameters", "dense", 4, 10**12, 10)
    reasons = bench_scale.run_alone([*cases, large], path, limit=100)
    assert list(reasons) == [large]
    assert "skipped" in reasons[large]
    found = read_rows(path, bench_scale.ALONE)
    assert set(found) == {dataclasses.astuple(case) for case in cases}
    few, many, none, _, _ = (found[dataclasses.astuple(case)] for case in cases)
    assert few["collectives"] == many["collectives"] > none["collectives"] == 0
    assert min(few["seconds"], few["compile_seconds"], few["memory_bytes"]) > 0
    text = path.read_text()
    path.write_text(text + '{"grows": "lea')
    assert bench_scale.run_alone(cases, path, limit=0.0) == {}  # nothing left to run
    missing = dataclasses.replace(cases[0], leaves=11)
    assert "not done within" in bench_scale.run_alone([missing], path, limit=0.01)[missing]


def _row(case, **values):
    common = {"load": 1.0, "compute_seconds": 0.01, "trace_seconds": 0.1, "compile_seconds": 0.1}
    common |= {"memory_bytes": 10**6, "collectives": 2, "parameters": 10**6, "sent_bytes": 1.0}
    return {**common, **dataclasses.asdict(case), **values}


def test_the_report_compares(tmp_path):
    alone = [
        _row(Case("leaves", method, 2, 10**6, n), seconds=seconds * n**0.1)
        for method, seconds in (("none", 0.01), ("dense", 0.02))
        for n in (10, 10_000)
    ]
    alone += [{**row, "examples": 64, "seconds": row["seconds"] + 0.1} for row in alone]
    guess = bench_scale_report.predicted("dense", 2, "100mbit", 0.01).step_seconds
    between = [
        _row(Link("dense", 2, "100mbit"), seconds=guess / 0.9),
        _row(Link("local", 2, "100mbit"), seconds=1.0),
    ]
    text = bench_scale_report.report(alone, between)
    assert "- dense: 1,000 times the leaves, 2.00 times the seconds a step" in text
    assert "| dense | 10 | 0.0252 | 0.0126 |" in text  # 0.01 * 10^0.1 beyond `none`
    both = text.index("## Leaves of 1,000,000 parameters\n"), text.index("parameters, computing\n")
    assert both[0] < text.index("- dense: 1,000 times the leaves, 2.00") < both[1]
    assert text.count("| dense | 10 | 0.1252 | 0.0126 |") == 1  # beside `none` that computes
    assert "1 of 2 predictions within 15%." in text
    assert "| 0.90 | 1.0 |" in text
    bench_scale_report.draw(alone, between, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_predictions_know_what_a_link_carries():
    step = lambda method, n: bench_scale_report.predicted(method, n, "100mbit", 0.0).step_seconds
    dense = 2 * 0.5 * 4 * bench_scale_report.traffic_of("dense", 2).elements
    burst = 0.01 * 1e8 / 8  # bytes of 10 ms
    assert step("dense", 2) == pytest.approx(8 * (1.055 * dense - burst) / 1e8, rel=0.01)
    assert step("local", 2) == pytest.approx(step("dense", 2) / 8, rel=0.02)
    assert step("sign two-phase", 4) < step("dense", 4) / 15


@pytest.mark.slow
def test_hosts_are_measured_and_predicted(tmp_path):
    path = tmp_path / "rows.jsonl"
    links = link_cases([2], ["100mbit"])
    if why := bench_scale.run_hosts(links, path, limit=300):
        pytest.skip(why)
    found = read_rows(path, bench_scale.HOSTS)
    assert [row["method"] for row in found.values()] == list(METHODS[1:])
    for row in found.values():
        assert 0 < row["compute_seconds"] < 1.5 * row["seconds"], json.dumps(row)
    dense = found["dense", 2, "100mbit"]
    assert dense["seconds"] > 8 * dense["sent_bytes"] / netns.parse_rate("100mbit")
