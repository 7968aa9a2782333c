"""SAVIC: scaled local steps; limits, bounds, and badly scaled problems."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, collectives_outside_conditionals, run

import jaxcomm

RULES = ("adam", "rmsprop", "oasis", "adahessian")
SCALE = lambda params, state, opt_state: (params, state.scale)


def reference(q, steps, every, *, rule, scaling, lr=0.02, b2=0.9, floor=0.05, ceiling=0.8):
    """x after every step. The Hessian is diagonal, so that z * (A z) is its diagonal."""
    n, d = q.b.shape
    x, scale, t = np.tile(q.x0.astype(np.float64), (n, 1)), np.zeros((n, d)), 0
    history = []
    for step in range(1, steps + 1):
        g = q.gradients(x)
        if (step - 1) % every == 0:
            h = g if rule in ("adam", "rmsprop") else np.tile(q.a, (n, 1))
            h = np.tile(h.mean(0), (n, 1)) if scaling == "global" else h
            beta = b2 if t else 0.0
            if rule == "adam":
                beta = (b2 - b2 ** (t + 1)) / (1 - b2 ** (t + 1))
            if rule == "oasis":
                scale = beta * scale + (1 - beta) * h
            else:
                scale = np.sqrt(beta * scale**2 + (1 - beta) * h**2)
            t += 1
        x = x - lr * g / np.clip(np.abs(scale), floor, ceiling)
        if step % every == 0:
            x = np.tile(x.mean(0), (n, 1))
        history.append(x)
    return np.stack(history, 1)


@pytest.mark.parametrize("scaling", ["global", "local"])
@pytest.mark.parametrize("rule", RULES)
def test_savic_follows_its_equations(rule, scaling):
    q = Quadratic()
    bounds = {"b2": 0.9, "floor": 0.05, "ceiling": 0.8}
    savic = jaxcomm.savic(AXIS, 3, rule=rule, scaling=scaling, **bounds)
    _, seen = run(savic, optax.sgd(0.02), q.loss, q.data, q.x0, 21)
    np.testing.assert_allclose(seen, reference(q, 21, 3, rule=rule, scaling=scaling), atol=1e-5)


def test_unit_scaling_is_local_sgd():
    q = Quadratic()
    unit = jaxcomm.savic(AXIS, 4, floor=1.0, ceiling=1.0)
    got = run(unit, optax.sgd(0.1, momentum=0.9), q.loss, q.data, q.x0, 18)[1]
    local = jaxcomm.local_sgd(AXIS, 4)
    want = run(local, optax.sgd(0.1, momentum=0.9), q.loss, q.data, q.x0, 18)[1]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_meeting_every_step_is_preconditioned_data_parallel_training():
    q = Quadratic()
    savic = jaxcomm.savic(AXIS, 1, rule="adam", b2=0.9, floor=1e-3)
    _, seen = run(savic, optax.sgd(0.02), q.loss, q.data, q.x0, 30)
    x, scale = q.x0.astype(np.float64), np.zeros(5)
    for t in range(30):
        g = q.gradients(np.tile(x, (4, 1))).mean(0)
        beta = (0.9 - 0.9 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        scale = np.sqrt(beta * scale**2 + (1 - beta) * g**2)
        x = x - 0.02 * g / np.maximum(scale, 1e-3)
    np.testing.assert_allclose(seen[0, -1], x, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_bounds_constancy_and_slow_drift(rule):
    q, every, b2, floor = Quadratic(), 4, 0.95, 0.02
    savic = jaxcomm.savic(AXIS, every, rule=rule, b2=b2, floor=floor)
    _, (x, scale) = run(savic, optax.sgd(0.01), q.loss, q.data, q.x0, 80, observe=SCALE)
    scale = np.abs(np.asarray(scale)[0])
    rounds = scale.reshape(20, every, -1)
    np.testing.assert_array_equal(rounds, np.tile(rounds[:, :1], (1, every, 1)))
    bounded = np.clip(rounds[:, 0], floor, None)
    # |H| <= Gamma gives floor <= D^ <= Gamma, and how much D^ can grow in one refresh
    gradients = q.a * np.abs(np.asarray(x)[:, None] - q.b[None, :, None]).max((0, 1))
    gamma = max(np.abs(gradients).max(), q.a.max(), np.abs(q.gradients(q.x0)).max())
    assert bounded.max() <= gamma * (1 + 1e-5)
    grow = 2 * (1 - b2) * gamma / floor
    if rule != "oasis":
        grow = (1 - b2) * gamma**2 / (2 * floor**2)
    if rule != "adam":  # whose first weights are small on purpose
        assert (bounded[1:] <= (1 + grow) * bounded[:-1] * (1 + 1e-5)).all()


def test_scaling_the_loss_and_the_floor_is_scaling_the_rate():
    q = Quadratic()
    seven = lambda x, b, key: 7.0 * q.loss(x, b, key)
    one = jaxcomm.savic(AXIS, 3, b2=0.9, floor=0.1)
    scaled = jaxcomm.savic(AXIS, 3, b2=0.9, floor=0.7)
    got = run(scaled, optax.sgd(0.02), seven, q.data, q.x0, 30)[1]
    want = run(one, optax.sgd(0.02), q.loss, q.data, q.x0, 30)[1]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("scaling", ["global", "local"])
def test_badly_scaled_problems_need_far_fewer_rounds(scaling):
    q = Quadratic(d=8, curvature=np.logspace(0, 4, 8))
    excess = lambda x: (q.a * (np.asarray(x)[0, 9::10] - q.b.mean(0)) ** 2).sum(-1)
    start = (q.a * (q.x0 - q.b.mean(0)) ** 2).sum()
    local = run(jaxcomm.local_sgd(AXIS, 10), optax.sgd(1e-4), q.loss, q.data, q.x0, 3000)[1]
    oasis = jaxcomm.savic(AXIS, 10, rule="oasis", scaling=scaling, floor=1e-2)
    fast = run(oasis, optax.sgd(0.3), q.loss, q.data, q.x0, 300)[1]
    assert (excess(local) > 1e-6 * start).all()  # 300 rounds: the smallest curvature is 1
    assert (excess(fast)[10:] < 1e-6 * start).all()


def test_hutchinsons_estimate_of_a_hessian_that_is_not_diagonal():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    hessian = jnp.asarray(root @ root.T, jnp.float32)
    loss = lambda p, b, key: 0.5 * jnp.vdot(p["x"], hessian @ p["x"]) + jnp.vdot(b, p["x"])
    rule = jaxcomm.savic(AXIS, 1, rule="oasis", b2=0.0, floor=1e3)
    observe = lambda params, state, opt_state: state.scale["x"]
    n, steps = 16, 200
    b, x0 = jnp.zeros((n, 6)), {"x": jnp.ones(6)}
    _, seen = run(rule, optax.sgd(0.0), loss, b, x0, steps, observe=observe)
    np.testing.assert_allclose(
        np.asarray(seen)[0].mean(0), np.diag(hessian), atol=5 * np.abs(hessian).sum(1).max() / 56
    )
    assert np.asarray(seen)[0].std(0).min() > 0.05  # a new z at every refresh


@pytest.mark.parametrize("bad", [(), (1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("rule", "scaling"), [("rmsprop", "global"), ("adahessian", "local")])
def test_estimates_that_are_not_finite_do_not_count(rule, scaling, first, bad):
    """D is 1 before its first estimate, and then stays as it was without one."""
    q, b2 = Quadratic(), 0.9
    step = jaxcomm.make_train_step(
        lambda p, b, k: q.loss(p, b[0], k) * jnp.where(b[0, 0] > 1e6, jnp.nan, 1.0),
        optax.sgd(0.02),
        axis_name=AXIS,
        sync=jaxcomm.savic(AXIS, 2, rule=rule, scaling=scaling, b2=b2, floor=1e-3),
        simulate=4,
        donate=False,
    )
    state = step.init(jnp.asarray(q.x0), jax.random.key(0))
    old = np.ones((4, 5))
    for _ in range(0 if first else 2):
        state, _ = step(state, q.data)
        old = np.broadcast_to(state.sync_state.scale, (4, 5))
    hurt = np.isin(np.arange(4), bad)
    h = q.gradients(np.asarray(state.params, np.float64)) if rule == "rmsprop" else [q.a] * 4
    h = np.where(hurt[:, None], np.nan, h)
    if scaling == "global" and not hurt.all():
        h[:] = np.nanmean(h, 0)
    beta = 0.0 if first else b2
    want = np.where(np.isnan(h), old, np.sqrt(beta * old**2 + (1 - beta) * h**2))
    after, metrics = step(state, jnp.where(hurt[:, None], 1e9, q.data))
    scale = np.broadcast_to(after.sync_state.scale, (4, 5))
    np.testing.assert_allclose(scale, want, atol=1e-6)
    estimates = np.broadcast_to(after.sync_state.estimates, 4)
    assert (estimates == int(not first) + ~np.isnan(h).any(1)).all()
    assert metrics["skipped"] == hurt.sum()
    if first and scaling == "local":  # the next meeting brings the first one of who has none
        for _ in range(2):
            before = np.asarray(after.params, np.float64)
            after, _ = step(after, q.data)
        h = np.abs(q.gradients(before)) if rule == "rmsprop" else np.tile(q.a, (4, 1))
        np.testing.assert_allclose(after.sync_state.scale[hurt], h[hurt], atol=1e-6)


def test_real_devices_agree_and_say_what_is_per_worker():
    q = Quadratic(n=8)
    for scaling, place, rule in (
        ("global", "replicated", "adahessian"),
        ("local", "per worker", "adam"),
    ):
        finals = []
        for simulate in (8, None):
            step = jaxcomm.make_train_step(
                lambda p, b, k: q.loss(p, b[0], k),
                optax.sgd(0.02),
                axis_name=AXIS,
                sync=jaxcomm.savic(AXIS, 2, rule=rule, scaling=scaling, floor=0.05),
                simulate=simulate,
            )
            state = step.init(jnp.asarray(q.x0), jax.random.key(0))
            assert collectives_outside_conditionals(step.trace(state, q.data).jaxpr) == []
            assert step.places.sync_state.scale.value == place
            assert step.places.sync_state.estimates.value == place
            assert step.places.sync_state.refreshes.value == "replicated"
            for _ in range(5):
                state, _ = step(state, q.data)
            finals.append(jax.tree.map(np.asarray, (state.params, state.sync_state.scale)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *finals)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rule": "adagrad"}, "got 'adagrad'"),
        ({"scaling": "none"}, "got 'none'"),
        ({"b2": 1.0}, "b2 must be in"),
        ({"floor": 0.0}, "floor=0.0"),
        ({"floor": 1.0, "ceiling": 0.5}, "ceiling=0.5"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        jaxcomm.savic(AXIS, 2, **kwargs)
