"""Streaming meetings: the schedule of fragments, delay and mixing, and the limit that is DiLoCo."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, collectives_outside_conditionals, run

import jaxcomm
from jaxcomm.sync._fragments import join, owners, split

LAYERS = {
    "blocks": {f"block_{i}": {"w": jnp.ones((4, 2)), "b": jnp.ones(i + 1)} for i in range(11)},
    "embed": {"embedding": jnp.ones((64, 2))},
    "norm": {"scale": jnp.ones(2)},
}
LIST = [jnp.ones(3), jnp.ones(4), jnp.ones(5), jnp.ones(6)]


def fragments_of(params, fragments, pattern="strided"):
    """Paths by fragment."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    owner = owners(params, fragments, pattern, "test")
    count = fragments if isinstance(fragments, int) else len(fragments)
    return [[q for q, p in zip(paths, owner) if p == k] for k in range(count)]


def test_layers_go_to_fragments_by_pattern():
    strided = fragments_of(LAYERS, 4)
    block = lambda i: [f"blocks/block_{i}/b", f"blocks/block_{i}/w"]
    # tree order, with block_2 before block_10, then the embedding and the last norm
    assert sorted(strided[0]) == sorted([*block(0), *block(4), *block(8), "norm/scale"])
    assert sorted(strided[2]) == sorted([*block(2), *block(6), *block(10)])
    assert strided[3][-1] == "embed/embedding"
    sequential = fragments_of(LAYERS, 4, "sequential")
    assert sorted(sequential[0]) == sorted([*block(0), *block(1), *block(2), *block(3)])
    assert sorted(sequential[3]) == sorted([*block(10), "embed/embedding", "norm/scale"])
    assert fragments_of(LIST, 2) == [["0", "2"], ["1", "3"]]
    assert fragments_of(jnp.ones(3), 1) == [[""]]


def test_balanced_fragments_are_balanced_by_bytes():
    owner = owners(LAYERS, 3, "balanced", "test")
    size = [0] * 3
    for leaf, p in zip(jax.tree.leaves(LAYERS), owner):
        size[p] += leaf.size
    assert sum(size) == 284
    assert max(size) == 128  # the embedding alone; the others share the rest
    assert min(size) >= 75


@pytest.mark.parametrize("pattern", ["strided", "sequential", "balanced"])
def test_fragments_are_disjoint_and_cover_the_tree(pattern):
    owner = owners(LAYERS, 5, pattern, "test")
    parts = split(LAYERS, owner, 5)
    assert sum(len(jax.tree.leaves(part)) for part in parts) == len(jax.tree.leaves(LAYERS))
    assert all(jax.tree.leaves(part) for part in parts)
    jax.tree.map(np.testing.assert_array_equal, join(parts, owner, LAYERS), LAYERS)


def test_fragments_by_name():
    assert fragments_of(LIST, [["1", "3"], ["0", "2"]]) == [["1", "3"], ["0", "2"]]
    assert len(fragments_of(LAYERS, (("blocks",), ("embed", "norm/scale")))[1]) == 2


@pytest.mark.parametrize(
    ("params", "fragments", "message"),
    [
        (LIST, 5, "only 4 layers or modules"),
        (LIST, [["0", "1"], ["2"]], "do not cover the tree: add '3'"),
        (LIST, [["0", "1", "2"], ["2", "3"]], r"'2' is in fragments \[0, 1\]"),
        (LIST, [["0", "1", "2"], ["3", "4"]], "name '4', which the tree does not have"),
    ],
)
def test_fragments_that_do_not_fit_are_refused(params, fragments, message):
    rule = jaxcomm.streaming(jaxcomm.average(AXIS), 10, fragments)
    with pytest.raises(ValueError, match=message):
        rule.init(params)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 10, "fragments": 4, "delay": 3}, r"\[0, 2.5\).*delay=3"),
        ({"every": 8, "fragments": 4, "delay": 2}, "delay=2"),
        ({"every": 10, "fragments": 4, "delay": -1}, "delay=-1"),
        ({"every": 3, "fragments": 4}, r"\[1, every=3\], got 4"),
        ({"every": 3, "fragments": 0}, "got 0"),
        ({"every": jaxcomm.every(4)}, "every must be a number of steps"),
        ({"every": 10, "mixing": 1.5}, "mixing must be in"),
        ({"every": 10, "pattern": "random"}, "got 'random'"),
        ({"every": 10, "total_steps": 0}, "total_steps must be at least 1"),
    ],
)
def test_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        jaxcomm.streaming_diloco(AXIS, **kwargs)
    with pytest.raises(ValueError, match="end it with an optimizer"):
        jaxcomm.streaming(optax.chain(jaxcomm.average(AXIS)), 4)


def tree_problem(leaves=4):
    """The quadratic with its coordinates in so many leaves."""
    q = Quadratic(d=3 * leaves)
    cut = lambda x: list(jnp.split(jnp.asarray(x), leaves, axis=-1))
    loss = lambda x, b, key: q.loss(jnp.concatenate(x), b, key)
    return q, loss, cut(q.x0)


def test_one_fragment_without_delay_is_diloco_to_the_bit():
    q, loss, x0 = tree_problem()
    tx = optax.adam(0.05)
    momentum = {"outer_learning_rate": 0.7, "outer_momentum": 0.9}
    _, want = run(jaxcomm.diloco(AXIS, 5, **momentum), tx, loss, q.data, x0, 23)
    rule = jaxcomm.streaming_diloco(AXIS, 5, 1, compressor=None, mixing=0, **momentum)
    _, got = run(rule, tx, loss, q.data, x0, 23)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def reference(q, steps, every, fragments, delay, mixing, *, total=None, lr=0.1, nu=0.7, mu=0.9):
    """Streaming DiLoCo of equal fragments of 3 coordinates, as equations; strided = in order."""
    d = len(q.x0)
    z, b = q.x0.astype(np.float64), np.zeros(d)
    x = np.tile(z, (q.n, 1))
    cuts = [slice(3 * p, 3 * p + 3) for p in range(fragments)]
    offsets = [(p + 1) * every // fragments for p in range(fragments)]
    history, arrivals = [], {}
    for t in range(1, steps + 1):
        x = x - lr * q.gradients(x)
        for p, (cut, offset) in enumerate(zip(cuts, offsets)):
            if (t >= offset and (t - offset) % every == 0) or t == total:
                mean = (z[cut] - x[:, cut]).mean(0)
                b[cut] = mu * b[cut] + mean
                z[cut] = z[cut] - nu * (mean + mu * b[cut])
                arrivals[p] = t if t == total else t + delay
            if arrivals.get(p) == t:
                alpha = 0.0 if t == total else mixing
                x[:, cut] = alpha * x[:, cut] + (1 - alpha) * z[cut]
        history.append(x.copy())
    return np.stack(history, 1)


@pytest.mark.parametrize(
    ("every", "delay", "mixing", "total"),
    [(8, 0, 0.0, None), (8, 1, 0.5, None), (10, 2, 0.25, 27), (9, 2, 0.0, 30)],
)
def test_streaming_follows_its_equations(every, delay, mixing, total):
    q, loss, x0 = tree_problem()
    rule = jaxcomm.streaming(
        optax.chain(jaxcomm.average(AXIS), optax.sgd(0.7, momentum=0.9, nesterov=True)),
        every,
        4,
        delay=delay,
        mixing=mixing,
        total_steps=total,
    )
    steps = total or 30
    _, seen = run(rule, optax.sgd(0.1), loss, q.data, x0, steps)
    seen = np.concatenate(seen, -1)
    want = reference(q, steps, every, 4, delay, mixing, total=total)
    np.testing.assert_allclose(seen, want, atol=5e-6)
    if total:
        assert (seen[:, -1] == seen[:1, -1]).all()


@pytest.mark.parametrize("delay", [0, 2])
def test_a_training_that_goes_on_beyond_its_end_keeps_delivering(delay):
    q, loss, x0 = tree_problem()
    rule = jaxcomm.streaming_diloco(AXIS, 5, 1, delay=delay, mixing=0.0, total_steps=6)
    _, seen = run(rule, optax.sgd(0.1), loss, q.data, x0, 14)
    seen = np.concatenate(seen, -1)
    equal = [t + 1 for t in range(14) if (seen[:, t] == seen[:1, t]).all()]
    assert equal == ([5, 6, 11] if delay == 0 else [6, 13])


@pytest.mark.slow
def test_every_parameter_meets_exactly_once_in_a_round():
    q, loss, x0 = tree_problem(5)
    for pattern in ("strided", "sequential", "balanced"):
        rule = jaxcomm.streaming_diloco(AXIS, 11, 3, pattern=pattern, delay=3)
        observe = lambda params, state, opt_state: (state.anchor, state.pending)
        _, (anchors, pending) = run(rule, optax.sgd(0.1), loss, q.data, x0, 44, observe=observe)
        for anchor in anchors:  # a leaf
            moved = np.diff(np.asarray(anchor)[0], axis=0, prepend=x0[0][None] * 0).any(-1)
            moved[0] = False
            times = np.flatnonzero(moved) + 1
            assert len(times) == 4
            assert (np.diff(times) == 11).all()
        assert {int(t) for t in np.asarray(pending).flat} <= set(range(48))
        assert (np.asarray(pending)[0] > 0).sum(0).max() == 3 * 4  # tau steps on the way, 4 rounds


def test_workers_that_never_listen_train_alone():
    q, loss, x0 = tree_problem()
    rule = jaxcomm.streaming_diloco(AXIS, 8, 4, delay=1, mixing=1.0)
    _, seen = run(rule, optax.sgd(0.1), loss, q.data, x0, 20)
    x = np.tile(q.x0.astype(np.float64), (q.n, 1))
    for _ in range(20):
        x = x - 0.1 * q.gradients(x)
    np.testing.assert_allclose(np.concatenate(seen, -1)[:, -1], x, atol=1e-5)


def test_four_bits_train_nearly_as_well_as_thirty_two():
    q, loss, x0 = tree_problem()
    best = q.b.mean(0)
    excess = lambda x: 0.5 * np.sum(q.a * (np.concatenate(x, -1).mean(0) - best) ** 2)
    start = 0.5 * np.sum(q.a * (q.x0 - best) ** 2)
    found = []
    for compressor in (None, jaxcomm.fp4_e3m0()):
        rule = jaxcomm.streaming_diloco(AXIS, 8, 4, compressor=compressor, outer_momentum=0.5)
        (x, _, _), _ = run(rule, optax.sgd(0.1), loss, q.data, x0, 400)
        found.append(excess(x) / start)
    # workers that differ this much leave a bias: rounding to the nearest has no error memory
    assert found[0] < 1e-6
    assert found[1] < 4e-3


@pytest.mark.slow
def test_real_devices_agree_and_only_due_fragments_travel():
    q, loss, x0 = tree_problem()
    q = Quadratic(n=8, d=12)
    rule = jaxcomm.streaming_diloco(AXIS, 8, 4, delay=1)
    finals = {}
    for simulate in (8, None):
        step = jaxcomm.make_train_step(
            lambda p, b, k: loss(p, b[0], k),
            optax.sgd(0.1),
            axis_name=AXIS,
            sync=rule,
            simulate=simulate,
        )
        state = step.init(x0, jax.random.key(0))
        assert collectives_outside_conditionals(step.trace(state, q.data).jaxpr) == []
        places = {place.value for place in jax.tree.leaves(step.places.sync_state)}
        assert places == {"replicated"}
        branches = []
        for _ in range(9):
            state, metrics = step(state, q.data)
            branches.append(np.asarray(metrics["branches"]).tolist())
        # launches are the even entries: one fragment every H/P = 2 steps, delivered a step later
        launched = [[i // 2 for i, taken in enumerate(b) if taken and i % 2 == 0] for b in branches]
        delivered = [[i // 2 for i, taken in enumerate(b) if taken and i % 2] for b in branches]
        assert launched == [[], [0], [], [1], [], [2], [], [3], []]
        assert delivered == [[], [], [0], [], [1], [], [2], [], [3]]
        finals[simulate] = jax.tree.map(np.asarray, (state.params, state.sync_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), finals[8], finals[None])
