"""An all-to-all in rounds: the same values, in permutations without mutual exchanges."""

import collections

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxcomm
from jaxcomm.collectives import primitives, rounds
from jaxcomm.compressors import sign
from jaxcomm.traffic.count import count
from jaxcomm.training._between_hosts import between_hosts
from jaxcomm.training.workers import Workers


@pytest.mark.parametrize("n", range(3, 17))
def test_permutations(n):
    used = collections.Counter()
    for ends in rounds.permutations(n):
        assert sorted(ends) == list(range(n))
        assert not any(ends[j] == i for i, j in enumerate(ends)), "two send to each other"
        used.update(enumerate(ends))
    pairs = {(i, j) for i in range(n) for j in range(n) if i != j}
    assert used == dict.fromkeys(pairs, 1 if n % 2 else 2)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "uint16", "int32"])
@pytest.mark.parametrize(
    ("mesh", "names"), [(4, ("w",)), ((2, 2), ("a", "b")), (3, ("w",)), (2, ("w",))]
)
def test_values(mesh, names, dtype):
    n = int(np.prod(mesh))
    draw = lambda s: np.random.default_rng(len(s)).integers(0, 200, (n, n, *s)).astype(dtype)
    xs = [draw(shape) for shape in [(), (1,), (5,), (3, 7), (2, 0)]]
    run = jax.shard_map(
        lambda *xs: [rounds.all_to_all(x[0], names)[None] for x in xs],
        mesh=common.mesh(mesh, names),
        in_specs=P(names),
        out_specs=P(names),
    )
    for x, found in zip(xs, jax.jit(run)(*xs)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x.swapaxes(0, 1))


@pytest.mark.parametrize("n", [5, 8])
def test_more_workers(n):
    x = np.arange(n * n * 6, dtype=np.int32).reshape(n, n, 6)
    run = jax.shard_map(
        lambda x: rounds.all_to_all(x[0], "w")[None],
        mesh=common.mesh(n, ("w",)),
        in_specs=P("w"),
        out_specs=P("w"),
    )
    np.testing.assert_array_equal(jax.jit(run)(x), x.swapaxes(0, 1))


@pytest.mark.parametrize(("size", "pieces"), [(1, 1), (15, 1), (16, 2), (100, 7), (10_000, 64)])
def test_two_workers_swap_in_pieces(size, pieces, monkeypatch):
    monkeypatch.setattr(rounds, "LARGEST", 64)
    x = np.arange(4 * size, dtype=np.float32).reshape(2, 2, size)
    run = jax.shard_map(
        lambda x: rounds.all_to_all(x[0], "w")[None],
        mesh=common.mesh(2, ("w",)),
        in_specs=P("w"),
        out_specs=P("w"),
    )
    np.testing.assert_array_equal(jax.jit(run)(x), x.swapaxes(0, 1))
    swaps = count(lambda x: rounds.all_to_all(x, "w"), x[0], axis_sizes={"w": 2})
    assert [c.sent_bytes for c in swaps] == pytest.approx([4 * size / pieces] * pieces, abs=4)


@pytest.mark.parametrize(("n", "size", "swaps"), [(2, 9000, 2), (2, 8000, 0), (3, 9000, 0)])
def test_large_gathers_of_two_are_swaps(n, size, swaps):
    """At most 32 kB go directly, and a ring of three has no mutual exchange."""
    x = np.arange(n * size, dtype=np.float32).reshape(n, size)
    gather = between_hosts(lambda x: primitives.all_gather(x, "w"))
    run = jax.shard_map(
        lambda x: gather(x[0]), mesh=common.mesh(n, ("w",)), in_specs=P("w"), out_specs=P()
    )
    np.testing.assert_array_equal(jax.jit(run)(x), x)
    assert str(jax.make_jaxpr(run)(x)).count("ppermute[") == swaps


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_bytes_of_an_all_to_all(n):
    x = jnp.ones((n, 400))
    sent = lambda fn: sum(c.sent_bytes for c in count(fn, x, axis_sizes={"w": n}))
    both = [sent(lambda x, f=f: f(x, "w")) for f in (primitives.all_to_all, rounds.all_to_all)]
    assert both == [1600 * (n - 1)] * 2


def test_only_what_is_large():
    at = rounds.LARGEST
    assert rounds.worth_it(4 * at + 1, 4)
    assert not rounds.worth_it(4 * at, 4)
    assert rounds.worth_it(2 * at + 1, 2)
    assert not rounds.worth_it(2 * at, 2)
    assert not rounds.worth_it(10**9, rounds.MOST + 1)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_step_between_hosts(every, monkeypatch):
    """Of gradients, and of meetings, which are inside a conditional."""
    used, own = [], rounds.all_to_all
    monkeypatch.setattr(rounds, "all_to_all", lambda *a: (used.append(a), own(*a))[1])
    monkeypatch.setattr(rounds, "LARGEST", 0)
    results = []
    for on_hosts in (False, True):
        monkeypatch.setattr(Workers, "on_hosts", on_hosts)
        exchange = jaxcomm.error_feedback(sign(), common.AXIS, exchange="two_phase")
        tx = optax.sgd(0.1) if every else optax.chain(exchange, optax.sgd(0.1))
        step = jaxcomm.make_train_step(
            common.loss_fn,
            tx,
            axis_name=common.AXIS,
            sync=jaxcomm.periodic(exchange, every) if every else None,
            mesh=common.mesh(4),
        )
        states, _ = common.run(step, steps=4)
        results.append(states[-1])
        assert bool(used) is on_hosts
    assert common.distance(*(state.params for state in results)) < 1e-6


def test_a_shard_map_inside_stays_whole():
    """As that of a loss function which splits its work over another axis of the mesh."""
    x = np.arange(16, dtype=np.float32).reshape(2, 8)

    def fn(x):
        inner = jax.shard_map(
            lambda y: jax.lax.psum(y, "b"), in_specs=P("b"), out_specs=P(), axis_names={"b"}
        )
        return primitives.all_sum(inner(x[0]), "a")

    options = {"in_specs": P("a"), "out_specs": P(), "axis_names": {"a"}}
    mesh = common.mesh((2, 2), ("a", "b"))
    for way in (fn, between_hosts(fn)):
        found = jax.jit(jax.shard_map(way, mesh=mesh, **options))(x)
        np.testing.assert_array_equal(found, x.sum(0).reshape(2, 4).sum(0))
