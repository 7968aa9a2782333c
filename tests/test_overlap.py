"""A step in pieces gives what the whole one gives, and its pieces are where they should be."""

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import PARAMS, batch, loss_fn

import jaxcomm
from jaxcomm.compressors import compose, quantize, sign, top_k
from jaxcomm.traffic.count import OPS, named_axes
from jaxcomm.training._pieces import in_one, take_apart
from jaxcomm.training._program import Program
from jaxcomm.training.overlap import JoinedStep
from jaxcomm.training.step import TrainStep
from jaxcomm.training.workers import Workers

AXIS = common.AXIS
ADAMW = optax.adamw(0.01)
CHAINS = {
    "average": lambda: optax.chain(jaxcomm.average(AXIS, bucket_bytes=100), ADAMW),
    "one sum": lambda: optax.chain(jaxcomm.average(AXIS), ADAMW),
    "two-phase": lambda: optax.chain(
        jaxcomm.error_feedback(sign(), AXIS, exchange="two_phase", bucket_bytes=64), ADAMW
    ),
    "random codec": lambda: optax.chain(jaxcomm.compressed_average(quantize(bits=8), AXIS), ADAMW),
    "ef21": lambda: optax.chain(jaxcomm.ef21(top_k(0.2), AXIS, momentum=0.3), ADAMW),
    "power_sgd": lambda: optax.chain(
        jaxcomm.power_sgd(1, AXIS, min_compression_rate=0, bucket_bytes=4), ADAMW
    ),
    "conditional": lambda: jaxcomm.one_bit_adam(0.01, AXIS, warmup_steps=2),
    "sign": lambda: jaxcomm.signum(0.01, AXIS),
    "factors": lambda: optax.chain(
        jaxcomm.power_sgd(
            2, AXIS, min_compression_rate=0, factors=quantize(4), exchange="two_phase"
        ),
        ADAMW,
    ),
    "sparse": lambda: optax.chain(
        jaxcomm.error_feedback(compose(top_k(0.2), quantize(4)), AXIS, bucket_bytes=64), ADAMW
    ),
}


@pytest.mark.parametrize("name", [name for name in CHAINS if name not in ("factors", "sparse")])
def test_same_as_the_whole_step(name):
    """To rounding: XLA may fuse the pieces otherwise."""
    results = []
    for background in (False, True):
        step = jaxcomm.make_train_step(
            loss_fn, CHAINS[name](), axis_name=AXIS, mesh=common.mesh(4), background=background
        )
        state = step.init(PARAMS, jax.random.key(0))
        for i in range(4):
            state, metrics = step(state, batch(i))
        results.append((common.host(state), common.host(metrics)))
    (plain, seen), (pieces, seen_in_pieces) = results
    assert jax.tree.structure(plain) == jax.tree.structure(pieces)
    assert common.distance(plain.params, pieces.params) < 1e-5
    np.testing.assert_array_equal(seen["branches"], seen_in_pieces["branches"])
    np.testing.assert_allclose(seen["loss"], seen_in_pieces["loss"], rtol=1e-5)


def layers_loss(params, batch, key):
    del key
    for w in params:
        batch = jnp.tanh(batch @ w)
    return jnp.mean(batch**2)


@pytest.mark.parametrize(
    "name", ["one sum", "two-phase", "power_sgd", "conditional", "factors", "sparse"]
)
def test_joined_messages_change_no_bit(name):
    """What hosts run: parts of a payload are one message, metrics travel with another sum."""
    results = []
    for kind in (TrainStep, JoinedStep):
        workers = Workers(AXIS, common.mesh(4))
        step = kind(loss_fn, CHAINS[name](), workers, None, True)
        state = step.init(PARAMS, jax.random.key(0))
        for i in range(3):
            state, metrics = step(state, batch(i))
        results.append((common.host(state), common.host(metrics)))
    assert common.same(*results)


def test_alone_is_the_same_work_without_communication():
    """With equal batches one worker alone does what all of them do."""
    step = jaxcomm.make_train_step(
        loss_fn, CHAINS["average"](), axis_name=AXIS, mesh=common.mesh(2), background=True
    )
    state = step.init(PARAMS, jax.random.key(0))
    equal = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), batch(0))
    alone = step.alone(state, equal)
    mine = jax.tree.map(lambda x: x[:4], equal)
    own = [x.addressable_data(0) for x in jax.tree.leaves(state)]
    found = alone([*own, *map(jnp.asarray, jax.tree.leaves(mine))])
    state, _ = step(state, equal)
    expected = jax.tree.leaves(state.params)
    at = len(jax.tree.leaves(state.step))
    for a, b in zip(found[at : at + len(expected)], expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


WIDTHS = (40, 41, 42, 43, 44)


def layers():
    draw = lambda i: np.random.default_rng(i).normal(size=WIDTHS[i : i + 2]).astype(np.float32)
    return [draw(i) / 7 for i in range(len(WIDTHS) - 1)]


def pieces_of(tx, fn=layers_loss, cut=take_apart, params=None):
    step = jaxcomm.make_train_step(fn, tx, axis_name=AXIS, mesh=common.mesh(2))
    state = step.init(layers() if params is None else params, jax.random.key(0))
    return cut(Program(step.trace(state, jnp.ones((4, WIDTHS[0])))))


def sums(travelling):
    """Elements of the float32 operands of every collective."""
    sizes = lambda op: [var.aval.size for var in op.eqn.invars]
    return [sizes(piece.ops[-1]) for piece in travelling]


def test_last_layers_leave_first():
    computing, travelling = pieces_of(
        optax.chain(jaxcomm.average(AXIS, bucket_bytes=4), optax.sgd(0.1, momentum=0.9))
    )
    backward = [[a * b] for a, b in zip(WIDTHS[-2::-1], WIDTHS[:0:-1])]
    assert sums(travelling) == backward
    matmuls = lambda piece: [op.eqn.primitive.name for op in piece.ops if op.eqn].count(
        "dot_general"
    )
    # the first message waits for the forward pass and the last layer alone
    assert matmuls(computing[0]) == 5
    assert sum(map(matmuls, computing)) == 4 + 4 + 3
    # updates follow the sums, the first two layers' together: the flags came with the second
    arrived = [{*piece.outputs} for piece in travelling]
    wanting = [[own & {*p.inputs} != set() for own in arrived] for p in computing]
    assert sorted(filter(any, wanting), reverse=True) == [
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_the_small_sum_of_metrics_joins_another():
    _, travelling = pieces_of(optax.chain(jaxcomm.average(AXIS, bucket_bytes=4), optax.sgd(0.1)))
    assert len(travelling) == 4  # four layers; no fifth for the metrics
    inputs = [len(piece.ops[-1].inputs) for piece in travelling]
    assert sorted(inputs) == [1, 1, 1, 2]
    _, one = pieces_of(optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1)))
    assert len(one) == 1


def test_it_joins_the_one_before_it_if_it_is_the_last():
    """The finite check of leaves that are alike needs more work than their gradients' sum."""
    fn = lambda params, batch, key: jnp.mean(batch) * sum(jnp.sum(w**2) for w in params)
    tx = optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1))
    _, one = pieces_of(tx, fn, params=20 * [np.ones((60, 30), np.float32)])
    assert [len(piece.ops[-1].inputs) for piece in one] == [2]


@pytest.mark.parametrize(
    ("chain", "messages"),
    [
        (lambda: jaxcomm.error_feedback(sign(), AXIS, exchange="two_phase"), 2),
        (lambda: jaxcomm.ef21(top_k(0.2), AXIS), 1),
        (lambda: jaxcomm.error_feedback(top_k(0.2), AXIS, bucket_bytes=4 * 1720), 5),
    ],
)
@pytest.mark.parametrize("cut", [take_apart, in_one])
def test_a_payload_is_one_message(chain, messages, cut):
    """Values, scales and indices travel as one, whole buckets apart; a sum for the metrics."""
    tx = optax.chain(chain(), optax.sgd(0.1))
    travelling = [op for part in pieces_of(tx, cut=cut) for p in part for op in p.ops if op.eqn]
    names = [op.eqn.primitive.name for op in travelling if named_axes(op.eqn)]
    names = [name for name in names if name in OPS]
    assert len(names) == messages + 1


def test_a_bad_gradient_is_skipped_by_all():
    def poisoned(params, batch, key):
        return loss_fn(params, batch, key) / jnp.min(batch[0])

    tx = CHAINS["average"]()
    step = jaxcomm.make_train_step(
        poisoned, tx, axis_name=AXIS, mesh=common.mesh(4), background=True
    )
    state = step.init(PARAMS, jax.random.key(0))
    before = common.host(state)
    x, y = batch(0)
    x[-1] = np.nan
    state, metrics = step(state, (x, y))
    assert int(metrics["skipped"]) == 1
    assert common.same(before.params, common.host(state).params)


def test_prints_in_the_loss_are_kept():
    seen = []

    def telling(params, batch, key):
        loss = loss_fn(params, batch, key)
        jax.debug.callback(lambda x: seen.append(float(x)), loss)
        return loss

    tx = CHAINS["average"]()
    step = jaxcomm.make_train_step(
        telling, tx, axis_name=AXIS, mesh=common.mesh(2), background=True
    )
    state = step.init(PARAMS, jax.random.key(0))
    _, metrics = step(state, batch(0))
    jax.effects_barrier()
    assert len(seen) == 2
    np.testing.assert_allclose(np.mean(seen), metrics["loss"], rtol=1e-5)


@pytest.mark.slow
def test_buckets_of_whole_leaves():
    """As many collectives as buckets; the same mean to the bit, low-rank means to rounding."""
    counts = {}
    for name, chain in (
        ("average", lambda b: jaxcomm.average(AXIS, bucket_bytes=b)),
        ("power_sgd", lambda b: jaxcomm.power_sgd(2, AXIS, bucket_bytes=b)),
    ):
        found = []
        for bucket in (None, 4 * 44 * 44, 4):
            tx = optax.chain(chain(bucket), optax.sgd(0.1))
            step = jaxcomm.make_train_step(layers_loss, tx, axis_name=AXIS, simulate=4)
            state = step.init(layers(), jax.random.key(0))
            x = np.random.default_rng(3).normal(size=(8, 40)).astype(np.float32)
            report = jaxcomm.traffic(step, state, x)
            counts[name, bucket] = len(report.every_step) - 1  # without the metrics
            for _ in range(3):
                state, _ = step(state, x)
            found.append(common.host(state.params))
        for other in found[1:]:
            assert common.distance(found[0], other) < (1e-9 if name == "average" else 1e-5)
    assert list(counts.values()) == [1, 2, 4, 2, 4, 8]
    with pytest.raises(ValueError, match="average: bucket_bytes must be at least 4"):
        jaxcomm.average(AXIS, bucket_bytes=0)


def test_refusals():
    for way in ({"simulate": 2}, {"pmap": 2}):
        with pytest.raises(ValueError, match="needs workers on devices"):
            jaxcomm.make_train_step(loss_fn, ADAMW, axis_name=AXIS, background=True, **way)
