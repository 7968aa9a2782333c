"""Sums and gathers without a ring: the same values, replicated, for the same bytes."""

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxcomm
from jaxcomm.collectives import direct
from jaxcomm.compressors import sign
from jaxcomm.traffic.count import count
from jaxcomm.training.overlap import JoinedStep
from jaxcomm.training.step import TrainStep
from jaxcomm.training.workers import Workers

SHAPES = [(), (0,), (3,), (direct.FEW,), (direct.FEW + 1,), (10, 13), (4099,)]


@pytest.mark.parametrize(("mesh", "names"), [(4, ("w",)), ((2, 2), ("a", "b")), (3, ("w",))])
def test_values(mesh, names):
    n = int(np.prod(mesh))
    draw = lambda s: np.random.default_rng(len(s)).normal(size=(n, *s)).astype(np.float32)
    both = lambda x: (direct.direct_sum(x[0], names), direct.direct_gather(x[0], names))
    run = jax.jit(
        jax.shard_map(
            lambda *xs: [both(x) for x in xs],
            mesh=common.mesh(mesh, names),
            in_specs=P(names),
            out_specs=P(),
        )
    )
    xs = [draw(s) for s in SHAPES]
    for x, (total, everyones) in zip(xs, run(*xs)):
        in_order = x[0]
        for row in x[1:]:
            in_order = in_order + row
        np.testing.assert_array_equal(total, in_order)
        np.testing.assert_array_equal(everyones, x)
        assert total.sharding.is_fully_replicated


def test_along_one_axis_of_two():
    x = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    run = jax.shard_map(
        lambda x: direct.direct_sum(x[0, 0], "a")[None],
        mesh=common.mesh((2, 2), ("a", "b")),
        in_specs=P("a", "b"),
        out_specs=P("b"),
    )
    np.testing.assert_array_equal(jax.jit(run)(x), x.sum(0))


def test_bytes_of_a_ring():
    sizes = {"w": 4}
    sent = lambda fn, x: sum(c.sent_bytes for c in count(fn, x, axis_sizes=sizes))
    x = jnp.ones(400)
    ring, straight = jaxcomm.collectives.all_sum, direct.direct_sum
    assert sent(lambda x: straight(x, "w"), x) == sent(lambda x: ring(x, "w"), x) == 2400
    ring, straight = jaxcomm.collectives.all_gather, direct.direct_gather
    assert sent(lambda x: straight(x, "w"), x) == sent(lambda x: ring(x, "w"), x) == 4800


def test_only_what_is_small():
    at = direct.LARGEST
    assert direct.worth_it("all-gather", at, 4)
    assert not direct.worth_it("all-gather", at + 1, 4)
    assert direct.worth_it("all-reduce", 4 * at, 4)
    assert not direct.worth_it("all-reduce", 4 * at + 1, 4)
    assert not direct.worth_it("all-to-all", 1, 4)
    assert not direct.worth_it("all-gather", 1, direct.MOST + 1)


@pytest.mark.parametrize("way", ["gather", "two_phase"])
def test_a_step_between_hosts(way, monkeypatch):
    """To rounding: the terms of a sum are added in another order."""
    used = []
    for name in ("direct_sum", "direct_gather"):
        own = getattr(direct, name)
        monkeypatch.setattr(direct, name, lambda *a, own=own: (used.append(own), own(*a))[1])
    results = []
    for kind in (TrainStep, JoinedStep):
        monkeypatch.setattr(Workers, "on_hosts", kind is JoinedStep)
        feedback = jaxcomm.error_feedback(sign(), common.AXIS, exchange=way)
        tx, workers = optax.chain(feedback, optax.sgd(0.1)), Workers(common.AXIS, common.mesh(4))
        step = kind(common.loss_fn, tx, workers, None, True)
        states, _ = common.run(step, steps=3)
        results.append(states[-1])
        assert bool(used) is (kind is JoinedStep)
    assert common.distance(*(state.params for state in results)) < 1e-6
