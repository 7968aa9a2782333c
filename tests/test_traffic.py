"""Bytes of a step: every exchange by hand, conditionals, loops and what the user wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AXIS, batch, loss_fn, mesh, tree
from jax import lax

import jaxcomm
from jaxcomm.collectives import cond, primitives
from jaxcomm.traffic import count, traffic

N = 8
D = 15 + 7 + 0 + 1 + 1  # elements of tree()
SCALARS = 2 * (N - 1) / N * 4 * 2  # the small sum: a flag and the loss
KEY = jax.random.key(0)


def report(tx, sync=None, axis_name=AXIS, **way):
    step = jaxcomm.make_train_step(
        loss_fn, tx, axis_name=axis_name, sync=sync, **(way or {"simulate": N})
    )
    return traffic(step, step.abstract_state(tree(), KEY), batch(0))


def gathered(codec, size=D, n=N):
    return (n - 1) * codec.payload_bytes(size)


CODECS = {
    "sign": (jaxcomm.sign(), 3, 4),  # 24 bits, a float32 scale
    "top_k": (jaxcomm.top_k(k=5), 4 * 5, 4),  # indices of 5 bits: 25 bits are 4 bytes
    "cast": (jaxcomm.cast("bfloat16"), 2 * D, 0),
    "quantize": (jaxcomm.quantize(bits=4), D // 2, 4),
    "rand_k": (jaxcomm.rand_k(0.25), 4 * 6, 8),  # a seed in place of indices
}


@pytest.mark.parametrize("name", CODECS)
def test_a_gathered_payload_goes_to_everybody_else(name):
    codec, values, metadata = CODECS[name]
    assert codec.payload_bytes(D) == values + metadata
    found = report(optax.chain(jaxcomm.compressed_average(codec, AXIS), optax.sgd(0.1)))
    assert found.every_step_bytes == (N - 1) * (values + metadata) + SCALARS
    assert (found.payload_bytes, found.metadata_bytes) == ((N - 1) * values, (N - 1) * metadata)
    messages = [c for c in found.collectives if c.part != "metrics"]
    assert {c.op for c in messages} == {"all-gather"}
    assert all(np.dtype(c.dtype).kind == "u" for c in messages if c.part != "scale")


def test_a_dense_average():
    found = report(optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1)))
    assert found.every_step_bytes == found.dense_equivalent_bytes + SCALARS
    assert found.dense_equivalent_bytes == 2 * (N - 1) / N * 4 * D
    assert found.by("op") == {"all-reduce": found.every_step_bytes}
    assert found.by("part")["metrics"] == SCALARS
    assert (found.elements, found.workers, found.metadata_bytes) == (D, N, 0)


def test_two_phases():
    tx = jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase")
    found = report(optax.chain(tx, optax.sgd(0.1)))
    chunk = jaxcomm.sign().payload_bytes(3)  # a byte of signs, a scale
    assert chunk == 5
    assert found.by("op") == {
        "all-to-all": (N - 1) / N * N * chunk,
        "all-gather": (N - 1) * chunk,
        "all-reduce": SCALARS,
    }
    assert found.metadata_bytes == 2 * (N - 1) * 4


def test_every_way_counts_the_same():
    tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(0.2), AXIS), optax.adam(0.1))
    found = [report(tx, **way) for way in ({"simulate": N}, {"mesh": mesh(N)}, {"pmap": N})]
    assert found[0] == found[1] == found[2]
    assert found[0].collectives


def test_two_axes_count_as_their_product():
    names = ("pods", "hosts")
    for way in ({"simulate": (2, 4)}, {"mesh": mesh((2, 4), names)}):
        tx = optax.chain(jaxcomm.average(names), optax.sgd(0.1))
        found = report(tx, axis_name=names, **way)
        assert found.every_step_bytes == 2 * 7 / 8 * 4 * D + SCALARS
        assert found.by("axes") == {"pods,hosts": found.every_step_bytes}
        inner = report(
            optax.chain(jaxcomm.average("hosts"), jaxcomm.average("pods"), optax.sgd(1.0)),
            axis_name=names,
            **way,
        )
        assert inner.by("axes") == {
            "pods,hosts": SCALARS,
            "hosts": 2 * 3 / 4 * 4 * D,
            "pods": 2 * 1 / 2 * 4 * D,
        }


# Operations, on x of 6 float32 numbers.

X = jnp.zeros((6, 1))
OPS = {
    "all-reduce": (lambda x: lax.psum(x, AXIS), 2 * 2 / 3 * 24),
    "largest": (lambda x: lax.pmax(x, AXIS), 2 * 2 / 3 * 24),
    "all-gather": (lambda x: lax.all_gather(x, AXIS), 2 * 24),
    "all-to-all": (lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True), 2 / 3 * 24),
    "reduce-scatter": (lambda x: lax.psum_scatter(x, AXIS, tiled=True), 2 / 3 * 24),
    "permute": (lambda x: lax.ppermute(x, AXIS, [(0, 1), (1, 2), (2, 0)]), 24),
}


@pytest.mark.parametrize("name", OPS)
def test_operations(name):
    fn, sent = OPS[name]
    (one,) = count(fn, X, axis_sizes={AXIS: 3})
    assert one.sent_bytes == pytest.approx(sent)
    assert one.op == ("all-reduce" if name == "largest" else name)
    assert (one.part, one.axes, one.workers, one.when) == ("unnamed", (AXIS,), 3, ())


def test_one_worker_sends_nothing():
    for name, (fn, _) in OPS.items():
        if name != "permute":
            assert sum(c.sent_bytes for c in count(fn, X, axis_sizes={AXIS: 1})) == 0
    ring = lambda x: primitives.shift(x, AXIS)
    assert sum(c.sent_bytes for c in count(ring, X, axis_sizes={AXIS: 1})) == 0


def test_loops_and_nested_programs_count_every_time():
    once = jax.jit(lambda x: lax.psum(x, AXIS))

    def nested(x):
        x, _ = lax.scan(lambda c, _: (once(once(c)) / 9, None), x, length=5)
        return lax.fori_loop(
            0, 7, lambda i, c: lax.scan(lambda c, _: (once(c), None), c, length=2)[0], x
        )

    found = count(nested, X, axis_sizes={AXIS: 3})
    assert sum(c.times for c in found) == 5 * 2 + 7 * 2
    assert sum(c.sent_bytes for c in found) == pytest.approx(24 * OPS["all-reduce"][1])


def test_narrow_types_travel_as_unsigned_integers_of_their_width():
    for dtype, wire in [("bfloat16", "uint16"), ("float8_e4m3fn", "uint8"), ("bool", "uint8")]:
        (one,) = count(
            lambda x: primitives.all_gather(x, AXIS), X.astype(dtype), axis_sizes={AXIS: 3}
        )
        assert (one.dtype, one.sent_bytes) == (wire, 2 * 6 * jnp.dtype(dtype).itemsize)
    (one,) = count(
        lambda x: primitives.all_sum(x, AXIS), X.astype("bfloat16"), axis_sizes={AXIS: 3}
    )
    assert one.dtype == "float32"  # sums are wide


# Conditionals.


def drive(step, steps):
    """Bytes of every step of a run, by its own choices."""
    state = step.init(tree(), KEY)
    found, sent = traffic(step, state, batch(0)), []
    for i in range(steps):
        state, metrics = step(state, batch(i))
        sent.append(found.step_bytes(np.asarray(metrics["branches"])))
    return found, sent


def test_a_run_of_local_sgd_costs_its_rounds():
    rule = jaxcomm.local_sgd(AXIS, 3, total_steps=10)
    step = jaxcomm.make_train_step(loss_fn, optax.adam(0.01), axis_name=AXIS, sync=rule, simulate=N)
    found, sent = drive(step, 10)
    dense = found.dense_equivalent_bytes
    assert sent == [dense if t in (3, 6, 9, 10) else 0.0 for t in range(1, 11)]
    assert (found.every_step_bytes, found.conditional_bytes) == (0.0, dense)
    assert (found.smallest_step_bytes, found.largest_step_bytes) == (0.0, dense)


def every_other(choices):
    """A chain that compresses by the step's number: nested conditionals of the library."""

    def init_fn(params):
        del params
        return jnp.zeros((), jnp.int32)

    def update_fn(updates, t, params=None):
        del params
        send = lambda codec: (
            lambda u: jaxcomm.compressed_average(codec, AXIS).update(
                u, jaxcomm.compressed_average(codec, AXIS).init(None)
            )[0]
        )
        inner = lambda u: choices(t % 4 == 1, send(jaxcomm.sign()), send(jaxcomm.top_k(k=5)), u)
        updates = choices(t % 2 == 0, send(jaxcomm.identity()), inner, updates)
        return updates, t + 1

    return optax.chain(optax.GradientTransformation(init_fn, update_fn), optax.sgd(0.01))


def test_nested_conditionals_are_followed_step_by_step():
    step = jaxcomm.make_train_step(loss_fn, every_other(cond), axis_name=AXIS, simulate=N)
    found, sent = drive(step, 8)
    dense, sign, sparse = (
        found.dense_equivalent_bytes,
        gathered(jaxcomm.sign()),
        gathered(jaxcomm.top_k(k=5)),
    )
    assert sent == [SCALARS + x for x in [dense, sign, dense, sparse] * 2]
    assert len(found.choices) == 2
    assert found.largest_step_bytes == SCALARS + max(dense, sign, sparse)
    assert found.smallest_step_bytes == SCALARS + min(dense, sign, sparse)
    assert found.every_step_bytes == SCALARS


def test_a_users_own_conditional_is_known_by_its_bounds():
    """lax.cond does not report its choices: a step counts both branches, an upper bound."""
    step = jaxcomm.make_train_step(loss_fn, every_other(lax.cond), axis_name=AXIS, simulate=N)
    found = traffic(step, step.abstract_state(tree(), KEY), batch(0))
    dense, sign, sparse = (
        found.dense_equivalent_bytes,
        gathered(jaxcomm.sign()),
        gathered(jaxcomm.top_k(k=5)),
    )
    assert found.choices == ()
    assert found.step_bytes(()) == SCALARS + dense + sign + sparse
    assert found.largest_step_bytes == SCALARS + max(dense, sign, sparse)


def test_a_users_conditional_inside_the_librarys_is_kept_apart():
    def fn(x):
        inner = lambda x: lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, AXIS), lambda x: 3.0 * x, x)
        return cond(x[0, 0] < 5, inner, lambda x: x, x)

    (one,) = count(fn, X, axis_sizes={AXIS: 3})
    assert len(one.when) == 2
    assert one.when[1][0].startswith("unmetered")


def test_what_the_user_sends_is_counted():
    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: lax.psum(u, AXIS) / N, updates), state

    mine = optax.GradientTransformation(init_fn, update_fn)
    found = report(optax.chain(mine, optax.sgd(0.1)))
    assert found.by("part") == {"unnamed": found.dense_equivalent_bytes, "metrics": SCALARS}


def test_thousands_of_workers_are_counted_without_devices():
    tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=5), AXIS), optax.sgd(0.1))
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, simulate=4096)
    found = traffic(step, step.abstract_state(tree(), KEY), batch(0, rows=4096))
    assert found.by("part")["values"] == 4095 * 4 * 5
