"""SlowMo and CO2: equations, limits, staleness, and a clip that clips."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, run

import jaxcomm


def reference(
    q, steps, every, *, lr=0.1, alpha=1.0, beta=0.5, stale=1, clip=None, gap=None, rate=None
):
    """z after every round, by the equations."""
    z, m = q.x0.astype(np.float64), np.zeros(len(q.x0))
    old, sent, history = z, [], []
    for t in range(steps // every):
        x = np.tile(z, (q.n, 1))
        for k in range(every):
            gamma = lr if rate is None else rate(t * every + k)
            x = x - gamma * q.gradients(x)
        sent.append((z - x).mean(0))
        p = sent[-1 - stale] if len(sent) > stale else 0 * z
        if gap is not None:
            p = p / gap(z - old, p)
        scale = 1.0 if rate is None else gamma
        m = beta * m + p / scale
        if clip is not None:
            m = np.clip(m, -clip, clip)
        old, z = z, z - alpha * scale * m
        history.append(z)
    return np.stack(history)


def anchors(rule, q, steps, every, tx=None):
    observe = lambda params, state, opt_state: (state.anchor, params)
    _, (z, x) = run(rule, tx or optax.sgd(0.1), q.loss, q.data, q.x0, steps, observe=observe)
    z, x = (np.asarray(a)[:, every - 1 :: every] for a in (z, x))
    assert (x == x[:1]).all()  # all workers start every round at the same point
    np.testing.assert_array_equal(x, z)
    return z[0]


@pytest.mark.parametrize("stale", [0, 1, 2])
def test_co2_and_slowmo_follow_their_equations(stale):
    q = Quadratic()
    got = anchors(jaxcomm.co2(AXIS, 4, alpha=0.7, beta=0.4, delay=stale), q, 40, 4)
    want = reference(q, 40, 4, alpha=0.7, beta=0.4, stale=stale)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_limits():
    q = Quadratic()
    slowmo = anchors(jaxcomm.slowmo(AXIS, 4, alpha=0.7, beta=0.4), q, 40, 4)
    waiting = anchors(jaxcomm.co2(AXIS, 4, alpha=0.7, beta=0.4, delay=0), q, 40, 4)
    np.testing.assert_array_equal(slowmo, waiting)
    local = anchors(jaxcomm.local_sgd(AXIS, 4), q, 40, 4)
    plain = anchors(jaxcomm.slowmo(AXIS, 4, beta=0.0), q, 40, 4)
    np.testing.assert_allclose(plain, local, atol=1e-7)
    # one-round-stale local SGD: z_{t+1} = z_t - (z_{t-1} - mean x_{t-1})
    stale = anchors(jaxcomm.co2(AXIS, 4, alpha=1.0, beta=0.0), q, 40, 4)
    np.testing.assert_allclose(stale, reference(q, 40, 4, beta=0.0), atol=5e-6)
    assert np.abs(stale - local).max() > 0.1


@pytest.mark.parametrize(("a", "stable"), [(0.97, True), (1.03, False)])
def test_one_round_stale_is_stable_while_a_round_contracts(a, stable):
    # z_{t+1} = z_t - (1 - c) z_{t-1}: stable iff a = 1 - c < 1; a > 1 is a round that overshoots
    q = Quadratic(n=2, d=1, spread=0.0, curvature=[1.0])
    q.x0 = np.ones(1, np.float32)
    rule = jaxcomm.co2(AXIS, 1, alpha=1.0, beta=0.0)
    z = anchors(rule, q, 400, 1, tx=optax.sgd(a))
    assert (np.abs(z[-50:]).max() < 0.1) == stable
    assert (np.abs(z[-50:]).max() > 10) != stable


def test_the_clip_clips_the_momentum():
    q = Quadratic(spread=3.0)
    observe = lambda params, state, opt_state: state.outer.momentum
    largest = {}
    for clip in (None, 0.05):
        rule = jaxcomm.co2(AXIS, 4, clip=clip)
        _, m = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 80, observe=observe)
        largest[clip] = np.abs(np.asarray(m)).max()
    assert largest[None] > 0.5
    assert largest[0.05] == np.float32(0.05)
    got = anchors(jaxcomm.co2(AXIS, 4, clip=0.05), q, 80, 4)
    np.testing.assert_allclose(got, reference(q, 80, 4, clip=0.05), atol=1e-5)


def test_staleness_is_any_function_of_the_last_move_and_the_displacement():
    q = Quadratic()
    norm = np.linalg.norm
    gap = lambda move, p: 1 + norm(move) / (norm(p) or 1.0)
    got = anchors(jaxcomm.co2(AXIS, 4, staleness=jaxcomm.relative_gap), q, 80, 4)
    np.testing.assert_allclose(got, reference(q, 80, 4, gap=gap), atol=2e-5)
    assert np.abs(got - reference(q, 80, 4)).max() > 0.05
    each = lambda move, p: 1 + np.abs(move) / (np.abs(p) + 1e-3)
    leafwise = lambda move, p: 1 + jnp.abs(move) / (jnp.abs(p) + 1e-3)
    got = anchors(jaxcomm.co2(AXIS, 4, staleness=leafwise), q, 80, 4)
    np.testing.assert_allclose(got, reference(q, 80, 4, gap=each), atol=2e-5)


def test_momentum_in_gradient_units_follows_the_inner_rate():
    q = Quadratic()
    schedule = optax.linear_schedule(0.2, 0.0, 40)
    rate = lambda k: 0.2 * (1 - min(k, 40) / 40)
    rule = jaxcomm.slowmo(AXIS, 4, alpha=0.9, beta=0.6, learning_rate=schedule)
    got = anchors(rule, q, 40, 4, tx=optax.sgd(schedule))
    want = reference(q, 40, 4, alpha=0.9, beta=0.6, stale=0, rate=rate)
    np.testing.assert_allclose(got, want, atol=2e-5)
    # beyond the schedule's end nothing moves, and nothing is divided by zero
    x = run(rule, optax.sgd(schedule), q.loss, q.data, q.x0, 60)[0][0]
    assert np.isfinite(np.asarray(x)).all()
    constant = jaxcomm.slowmo(AXIS, 4, alpha=0.9, beta=0.6, learning_rate=0.1)
    by_displacement = jaxcomm.slowmo(AXIS, 4, alpha=0.9, beta=0.6)
    np.testing.assert_allclose(
        anchors(constant, q, 40, 4), anchors(by_displacement, q, 40, 4), atol=1e-6
    )


def test_any_outer_optimizer_is_fed_opt():
    q = Quadratic()
    fed_adam = jaxcomm.fed_opt(AXIS, 4, optax.adam(0.1))
    z, state = jnp.asarray(q.x0), optax.adam(0.1).init(jnp.asarray(q.x0))
    got = anchors(fed_adam, q, 40, 4)
    for t in range(10):
        x = np.tile(np.asarray(z, np.float64), (q.n, 1))
        for _ in range(4):
            x = x - 0.1 * q.gradients(x)
        d = jnp.asarray(np.asarray(z) - x.mean(0), jnp.float32)
        updates, state = optax.adam(0.1).update(d, state, z)
        z = optax.apply_updates(z, updates)
        np.testing.assert_allclose(got[t], z, atol=1e-4)
    average = anchors(jaxcomm.fed_opt(AXIS, 4, optax.sgd(1.0)), q, 40, 4)
    np.testing.assert_array_equal(average, anchors(jaxcomm.local_sgd(AXIS, 4), q, 40, 4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": 1.0}, "beta must be in .0, 1., got 1.0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"delay": -1}, "delay must not be negative, got -1"),
        ({"alpha": -1.0}, "away from the workers"),
        ({"every": 0}, "every=0"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        jaxcomm.co2(AXIS, **kwargs)
