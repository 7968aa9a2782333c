"""Controlled averaging: SCAFFOLD against its original form, and what the compressed ones keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, collectives_outside_conditionals, run

import jaxcomm

K, LR = 5, 0.1


class Clients(Quadratic):
    """Quadratics that differ in curvature as well: local steps alone would drift."""

    def __init__(self, n=6, d=5, seed=0):
        super().__init__(n, d, seed, spread=2.0)
        rng = np.random.default_rng(seed + 1)
        self.curvatures = rng.uniform(0.1, 1.5, (n, d)).astype(np.float32).astype(np.float64)
        self.data = (jnp.asarray(self.curvatures, jnp.float32), self.data)
        total = (self.curvatures * self.b).sum(0)
        self.optimum = total / self.curvatures.sum(0)

    def loss(self, x, data, key):
        del key
        return 0.5 * jnp.sum(data[0] * (x - data[1]) ** 2)

    def gradients(self, x):
        return self.curvatures * (x - self.b)


def history(rule, q, rounds, tx=None):
    """x, c, c_i after every round, and which clients took part."""
    observe = lambda params, s, opt_state: (params, s.anchor, s.control, s.own_control)
    _, seen = run(rule, tx or optax.sgd(LR), q.loss, q.data, q.x0, rounds * K, observe=observe)
    params, x, c, own = (np.asarray(a)[:, K - 1 :: K].swapaxes(0, 1) for a in seen)
    assert (params == params[:, :1]).all()
    before = np.concatenate([np.zeros_like(own[:1]), own[:-1]])
    return x[:, 0], c[:, 0], own, (own != before).any(-1)


def original_scaffold(q, rounds, took_part, eta_g=1.0):
    """Karimireddy et al., option II, with two vectors up: delta y and delta c."""
    n, d = q.b.shape
    x, c, own, out = q.x0.astype(np.float64), np.zeros(d), np.zeros((n, d)), []
    for chosen in took_part[:rounds]:
        y = np.tile(x, (n, 1))
        for _ in range(K):
            y = y - LR * (q.gradients(y) - own + c)
        new = own - c + (x - y) / (K * LR)
        s = chosen[:, None]
        x = x + eta_g * ((y - x) * s).sum(0) / chosen.sum()
        c = c + ((new - own) * s).sum(0) / n
        own = np.where(s, new, own)
        out.append(x)
    return np.stack(out)


@pytest.mark.parametrize(("participants", "eta_g"), [(None, 1.0), (None, 0.7), (2, 1.0)])
def test_scaffold_is_the_original_with_one_vector_less(participants, eta_g):
    q = Clients()
    rule = jaxcomm.scaffold(
        AXIS, K, LR, participants=participants, global_learning_rate=eta_g, seed=3
    )
    x, _, _, took_part = history(rule, q, 30)
    assert (took_part.sum(1) == (participants or q.n)).all()
    np.testing.assert_allclose(x, original_scaffold(q, 30, took_part, eta_g), atol=2e-5)
    if participants:
        assert took_part.any(0).all()  # everyone's turn comes, and it is not always the same
    else:  # no drift, though K > 1 and curvatures differ: local SGD stays away from the optimum
        far = run(jaxcomm.local_sgd(AXIS, K), optax.sgd(LR), q.loss, q.data, q.x0, 400 * K)[0][0]
        near = run(rule, optax.sgd(LR), q.loss, q.data, q.x0, 400 * K)[0][0]
        assert np.abs(np.asarray(far)[0] - q.optimum).max() > 0.05
        assert np.abs(np.asarray(near)[0] - q.optimum).max() < 1e-4


def test_compressed_forms_with_the_identity_are_scaffold():
    q = Clients()
    same = {"participants": 3, "seed": 5}
    want = history(jaxcomm.scaffold(AXIS, K, LR, **same), q, 20)
    for rule in (
        jaxcomm.scallion(jaxcomm.identity(), AXIS, K, LR, scaling=1.0, **same),
        jaxcomm.scafcom(jaxcomm.identity(), AXIS, K, LR, momentum=1.0, **same),
    ):
        got = history(rule, q, 20)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("participants", [None, 2])
@pytest.mark.parametrize("name", ["scallion", "scafcom"])
def test_the_control_is_the_mean_of_the_clients_controls(name, participants):
    q = Clients()
    make, codec, extra = {
        "scallion": (jaxcomm.scallion, jaxcomm.quantize(4, rounding="stochastic"), "scaling"),
        "scafcom": (jaxcomm.scafcom, jaxcomm.top_k(k=2), "momentum"),
    }[name]
    rule = make(codec, AXIS, K, LR, participants=participants, **{extra: 0.5})
    _, c, own, took_part = history(rule, q, 40)
    np.testing.assert_allclose(c, own.mean(1), atol=1e-5)
    assert (took_part.sum(1) == (participants or q.n)).all()


def test_scafcom_follows_its_equations():
    q, b, k = Clients(), 0.3, 2
    rule = jaxcomm.scafcom(jaxcomm.top_k(k=k), AXIS, K, LR, momentum=b, global_learning_rate=0.5)
    got = history(rule, q, 25)[0]
    n, d = q.b.shape
    x, c, own, v = q.x0.astype(np.float64), np.zeros(d), np.zeros((n, d)), np.zeros((n, d))
    for t in range(25):
        y = np.tile(x, (n, 1))
        for _ in range(K):
            y = y - LR * (q.gradients(y) - own + c)
        v = (1 - b) * v + b * ((x - y) / (K * LR) + own - c)
        m = v - own
        m = np.where(np.abs(m) >= np.sort(np.abs(m), 1)[:, -k][:, None], m, 0)
        x = x - 0.5 * LR * K * (m.mean(0) + c)  # the old c
        own, c = own + m, c + m.mean(0)
        np.testing.assert_allclose(got[t], x, atol=2e-5)


@pytest.mark.parametrize("name", ["scallion", "scafcom"])
def test_compression_still_reaches_the_optimum_of_clients_that_differ(name):
    q = Clients()
    rule = {
        "scallion": jaxcomm.scallion(
            jaxcomm.quantize(4, rounding="stochastic"), AXIS, K, LR, scaling=0.3, participants=3
        ),
        "scafcom": jaxcomm.scafcom(jaxcomm.top_k(k=1), AXIS, K, LR, global_learning_rate=0.3),
    }[name]
    x = run(rule, optax.sgd(LR), q.loss, q.data, q.x0, 1500 * K)[0][0]
    np.testing.assert_allclose(x[0], q.optimum, atol=2e-3)


def test_the_optimum_with_its_controls_is_a_fixed_point():
    q = Clients()
    rule = jaxcomm.scallion(jaxcomm.top_k(k=1), AXIS, K, LR)
    at_optimum = np.asarray(q.gradients(np.tile(q.optimum, (q.n, 1))), np.float32)
    init = rule.init

    def start(x):
        state = init(x)
        return state._replace(own_control=jnp.asarray(at_optimum)[jax.lax.axis_index(AXIS)])

    fixed = rule._replace(init=start)
    x = run(fixed, optax.sgd(LR), q.loss, q.data, q.optimum.astype(np.float32), 20 * K)[0][0]
    np.testing.assert_allclose(x[0], q.optimum, atol=1e-5)


def test_the_rates_of_a_schedule_are_summed():
    q = Clients()
    schedule = optax.linear_schedule(0.1, 0.0, 40)
    rule = jaxcomm.scaffold(AXIS, K, schedule)
    observe = lambda params, s, opt_state: (s.rates, s.own_control)
    tx = optax.sgd(schedule)
    (x, _, _), (rates, own) = run(rule, tx, q.loss, q.data, q.x0, 60, observe=observe)
    want = np.cumsum([0.1 * (1 - t / 40) for t in range(4)])
    np.testing.assert_allclose(np.asarray(rates)[0, :4], want, rtol=1e-5)
    assert np.asarray(rates)[0, 4] == 0  # a new round
    assert np.isfinite(np.asarray(x)).all()  # also where the rate has gone to zero
    assert np.isfinite(np.asarray(own)).all()


@pytest.mark.parametrize(
    ("name", "participants"), [("scaffold", None), ("scallion", 2), ("scafcom", 2)]
)
def test_skipped_steps_do_not_count(name, participants):
    """Losses a_i x: whatever the number of steps, the mean gradient of client i is a_i."""
    same = {"axis_name": AXIS, "every": K, "learning_rate": LR, "participants": participants}
    rule = {
        "scaffold": lambda: jaxcomm.scaffold(**same),
        "scallion": lambda: jaxcomm.scallion(jaxcomm.identity(), scaling=1.0, **same),
        "scafcom": lambda: jaxcomm.scafcom(jaxcomm.identity(), momentum=1.0, **same),
    }[name]()
    slopes = np.array([2.0, 4.0, 9.0], np.float32)
    step = jaxcomm.make_train_step(
        lambda p, b, k: jnp.mean(b) * p, optax.sgd(LR), axis_name=AXIS, sync=rule, simulate=3
    )
    state = step.init(jnp.float32(0), jax.random.key(0))
    for number in range(8):
        own = np.asarray(state.sync_state.own_control)
        for t in range(K):  # a third of a round, then none of one, then alternately
            gone = {0: t > 1, 1: False, 2: True}.get(number, t % 2 == 0)
            b = slopes.copy()
            b[1] = np.nan if gone else b[1]
            state, _ = step(state, b)
        now = state.sync_state
        moved = np.asarray(now.own_control) != own
        np.testing.assert_allclose(now.own_control, np.where(moved, slopes, own), atol=1e-4)
        np.testing.assert_allclose(now.control, np.mean(now.own_control), atol=1e-5)
        assert not np.any(now.own_rates)
        if number == 2:
            assert not moved[1]
    np.testing.assert_allclose(now.own_control, slopes, atol=1e-4)


def test_real_devices_agree_and_say_what_is_per_worker():
    q = Clients(n=8)
    rule = jaxcomm.scafcom(jaxcomm.top_k(k=2), AXIS, 2, LR, participants=5)
    finals = []
    for simulate in (8, None):
        step = jaxcomm.make_train_step(
            lambda p, b, k: q.loss(p, jax.tree.map(lambda x: x[0], b), k),
            optax.sgd(LR),
            axis_name=AXIS,
            sync=rule,
            simulate=simulate,
        )
        state = step.init(jnp.asarray(q.x0), jax.random.key(0))
        assert collectives_outside_conditionals(step.trace(state, q.data).jaxpr) == []
        places = jax.tree.map(lambda place: place.value, step.places.sync_state)
        assert {places.own_control, places.momentum, places.own_rates} == {"per worker"}
        assert {places.anchor, places.control, places.rates} == {"replicated"}
        for _ in range(6):
            state, _ = step(state, q.data)
        finals.append(jax.tree.map(np.asarray, (state.params, state.sync_state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *finals)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxcomm.scaffold(AXIS, 2, 0.1, participants=0), "participants must be at least 1"),
        (lambda: jaxcomm.scallion(jaxcomm.sign(), AXIS, 2, 0.1, scaling=0.0), "scaling must be in"),
        (lambda: jaxcomm.scafcom(jaxcomm.sign(), AXIS, 2, 0.1, momentum=2.0), "got 2.0"),
        (lambda: jaxcomm.scaffold(AXIS, 0, 0.1), "every=0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_participants_than_workers_are_refused():
    q = Clients()
    rule = jaxcomm.scaffold(AXIS, K, LR, participants=7)
    with pytest.raises(ValueError, match="participants=7, but there are only 6 workers"):
        run(rule, optax.sgd(LR), q.loss, q.data, q.x0, K)
