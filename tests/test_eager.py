"""Results used rounds later: eager updates, the naive delay, and what they cost on a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, collectives_outside_conditionals, run

import jaxcomm

NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def reference(q, steps, every, rounds, eager, *, lr=0.1, nu=0.7, mu=0.9):
    """The equations, with each worker's own anchor; x after every step."""
    z = np.tile(q.x0.astype(np.float64), (q.n, 1))
    x, b, sent = z.copy(), np.zeros_like(z), []
    history = []
    for t in range(1, steps + 1):
        x = x - lr * q.gradients(x)
        if t % every == 0:
            sent.append(z - x)
            if len(sent) <= rounds:
                p = sent[-1] if eager else 0 * z
            else:
                old = sent[-1 - rounds]
                p = np.tile(old.mean(0), (q.n, 1)) + (sent[-1] - old) / q.n * eager
            b = mu * b + p
            z = z - nu * (p + mu * b)
            x = z.copy()
        history.append(x)
    return np.stack(history, 1)


@pytest.mark.parametrize(("rounds", "eager"), [(1, True), (2, True), (1, False), (2, False)])
def test_overlapped_rounds_follow_their_equations(rounds, eager):
    q = Quadratic()
    rule = jaxcomm.overlapped(AXIS, 3, NESTEROV, rounds=rounds, eager=eager)
    _, seen = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 24)
    np.testing.assert_allclose(seen, reference(q, 24, 3, rounds, eager), atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2])
def test_one_eager_worker_is_diloco(rounds):
    q = Quadratic(n=1)
    eager = jaxcomm.eager_diloco(AXIS, 4, rounds=rounds)
    got = run(eager, optax.adam(0.05), q.loss, q.data, q.x0, 24)[1]
    want = run(jaxcomm.diloco(AXIS, 4), optax.adam(0.05), q.loss, q.data, q.x0, 24)[1]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_eager_replicas_end_equal():
    q = Quadratic()
    rule = jaxcomm.eager_diloco(AXIS, 4, total_steps=18)
    (x, _, state), seen = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 18)
    before = np.asarray(seen)[:, 15]  # after a meeting that is not the last
    assert (before != before[0]).any()
    assert (np.asarray(x) == np.asarray(x)[0]).all()
    assert (np.asarray(state.sync_step) == 5).all()


@pytest.mark.parametrize(("tau", "limit"), [(1, 1.0), (2, 2 * np.sin(np.pi / 10))])
def test_a_delay_is_stable_up_to_its_limit(tau, limit):
    # z_{t+1} = z_t - a z_{t-tau} with a = nu (1 - (1 - lr)^H); stable iff a < 2 sin(pi/(4 tau + 2))
    assert limit == pytest.approx(2 * np.sin(np.pi / (4 * tau + 2)))
    q = Quadratic(n=2, d=1, spread=0.0, curvature=[1.0])
    contraction = 1 - 0.9**5

    def last(a):
        rule = jaxcomm.overlapped(AXIS, 5, optax.sgd(a / contraction), rounds=tau)
        _, seen = run(rule, optax.sgd(0.1), q.loss, q.data, np.ones(1, np.float32), 2000)
        return np.abs(np.asarray(seen)[0, -100:]).max()

    assert last(0.97 * limit) < 0.1
    assert last(1.03 * limit) > 10


@pytest.mark.slow
def test_eager_lies_between_waiting_and_the_naive_delay():
    """The figures of sheet F.7 (a); it does not say where training starts: here at 1.1."""
    d, workers, rounds, every = 30, 2, 60, 10
    curvature = jnp.asarray(np.logspace(-1.5, 0, d), jnp.float32)
    noise = lambda x, key: 0.3 * jnp.vdot(jax.random.normal(key, x.shape), x)
    loss = lambda x, b, key: 0.5 * jnp.sum(curvature * (x - b) ** 2) + noise(x, key)

    def excess(make, nu, seed):
        key = jax.random.key(seed)
        b = 0.3 * jax.random.normal(key, (workers, d))
        x0 = jnp.full((d,), 1.1)
        outer = optax.sgd(nu, momentum=0.9, nesterov=True)
        observe = lambda x, state, opt_state: state.anchor
        _, seen = run(
            make(outer),
            optax.sgd(0.02),
            loss,
            b,
            x0,
            rounds * every,
            observe=observe,
            seed=seed + 100,
        )
        z = seen.mean(0)[every - 1 :: every][-10:]
        return 0.5 * jnp.sum(curvature * (z - b.mean(0)) ** 2, -1).mean()

    rules = {
        "sync": lambda outer: jaxcomm.fed_opt(AXIS, every, outer),
        "eager": lambda outer: jaxcomm.overlapped(AXIS, every, outer, eager=True),
        "delayed": lambda outer: jaxcomm.overlapped(AXIS, every, outer),
    }
    sheet = {
        "sync": [0.0418, 0.0295, 0.0433],
        "eager": [0.0478, 0.0331, 0.0447],
        "delayed": [0.0693, 0.0430, 0.0496],
    }
    nus, seeds = jnp.array([0.7, 0.4, 0.2]), jnp.arange(5)
    got = {}
    for name, make in rules.items():
        over_seeds = jax.vmap(lambda nu, seed, make=make: excess(make, nu, seed), (None, 0))
        got[name] = np.asarray(jax.jit(jax.vmap(over_seeds, (0, None)))(nus, seeds)).mean(1)
        np.testing.assert_allclose(got[name], sheet[name], rtol=0.25)
    assert (got["sync"] < got["eager"]).all()
    assert (got["eager"] < got["delayed"]).all()
    # a smaller outer rate helps the naive delay most
    assert got["delayed"][1] / got["sync"][1] < got["delayed"][0] / got["sync"][0]


def test_real_devices_agree_and_say_what_is_per_worker():
    q = Quadratic(n=8)
    rule = jaxcomm.eager_diloco(AXIS, 2, total_steps=6)
    finals = {}
    for simulate in (8, None):
        step = jaxcomm.make_train_step(
            lambda p, b, k: q.loss(p, b[0], k),
            optax.sgd(0.1),
            axis_name=AXIS,
            sync=rule,
            simulate=simulate,
        )
        state = step.init(jnp.asarray(q.x0), jax.random.key(0))
        assert collectives_outside_conditionals(step.trace(state, q.data).jaxpr) == []
        places = step.places.sync_state
        assert {p.value for p in jax.tree.leaves((places.anchor, places.own))} == {"per worker"}
        assert {p.value for p in jax.tree.leaves(places.pending)} == {"replicated"}
        for _ in range(6):
            state, _ = step(state, q.data)
        finals[simulate] = jax.tree.map(np.asarray, (state.params, state.sync_state.pending))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *finals.values())
    assert (finals[None][0] == finals[None][0][0]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxcomm.eager_diloco(AXIS, 4, rounds=0), "rounds must be at least 1, got 0"),
        (
            lambda: jaxcomm.overlapped(AXIS, 4, optax.chain(jaxcomm.average(AXIS), NESTEROV)),
            "must not communicate .it does over 'workers'",
        ),
        (lambda: jaxcomm.overlapped(AXIS, 4, optax.trace(0.9)), "away from the workers"),
        (
            lambda: jaxcomm.eager_diloco(AXIS, 4, communication=optax.identity()),
            "communication does not average",
        ),
        (
            lambda: jaxcomm.eager_diloco(
                AXIS, 4, communication=optax.chain(jaxcomm.average(AXIS), optax.sgd(1.0))
            ),
            "turns its input around",
        ),
        (lambda: jaxcomm.eager_diloco(AXIS, 0), "every=0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compressed_eager_updates_converge():
    q = Quadratic()
    send = optax.chain(jaxcomm.error_feedback(jaxcomm.top_k(k=2), AXIS))
    rule = jaxcomm.eager_diloco(AXIS, 4, communication=send, outer_momentum=0.5)
    (x, _, _), _ = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 2000)
    np.testing.assert_allclose(np.asarray(x).mean(0), q.b.mean(0), atol=0.05)
