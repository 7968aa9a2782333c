"""Periodic meetings: local SGD, DiLoCo and any outer chain, against NumPy and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, collectives_outside_conditionals, run

import jaxcomm

NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def reference(q, steps, ends, *, lr=0.1, beta=0.0, nu=1.0, mu=0.0):
    """DiLoCo with inner heavy ball and outer Nesterov, as equations; all x after every step."""
    z, b = q.x0.astype(np.float64), np.zeros(len(q.x0))
    x, m = np.tile(z, (q.n, 1)), np.zeros((q.n, len(q.x0)))
    history = []
    for t in range(1, steps + 1):
        m = beta * m + q.gradients(x)
        x = x - lr * m
        if t in ends:
            mean = (z - x).mean(0)
            b = mu * b + mean
            z = z - nu * (mean + mu * b)
            x = np.tile(z, (q.n, 1))
        history.append(x)
    return np.stack(history, 1)


def test_local_sgd_and_diloco_follow_their_equations():
    q = Quadratic()
    for rule, ends, kwargs in [
        (jaxcomm.local_sgd(AXIS, 3, total_steps=20), {3, 6, 9, 12, 15, 18, 20}, {}),
        (jaxcomm.diloco(AXIS, 4), {4, 8, 12, 16, 20}, {"nu": 0.7, "mu": 0.9}),
    ]:
        _, seen = run(rule, optax.sgd(0.1, momentum=0.5), q.loss, q.data, q.x0, 20)
        want = reference(q, 20, ends, beta=0.5, **kwargs)
        np.testing.assert_allclose(seen, want, atol=2e-6)
        met = np.asarray(seen)[:, [t - 1 for t in ends]]
        assert (met == met[:1]).all()  # replicas are equal to the last bit


def test_meeting_every_step_is_data_parallel_training_for_linear_optimizers():
    q = Quadratic()
    for tx, equal in [(optax.sgd(0.1), 1), (optax.sgd(0.1, momentum=0.9), 1), (optax.adam(0.1), 0)]:
        _, seen = run(jaxcomm.local_sgd(AXIS, 1), tx, q.loss, q.data, q.x0, 30)
        x, state = jnp.asarray(q.x0), tx.init(jnp.asarray(q.x0))
        for _ in range(30):
            mean = jnp.asarray(q.gradients(np.asarray(x)).mean(0), jnp.float32)
            updates, state = tx.update(mean, state, x)
            x = optax.apply_updates(x, updates)
        distance = np.abs(np.asarray(seen)[0, -1] - np.asarray(x)).max()
        assert distance < 1e-5 if equal else distance > 1e-3  # Adam is not linear in g


def test_limits_of_the_outer_step():
    q = Quadratic()
    final = lambda rule: np.asarray(run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 12)[0][0])
    local = final(jaxcomm.local_sgd(AXIS, 4))
    plain = jaxcomm.diloco(AXIS, 4, outer_learning_rate=1.0, outer_momentum=0.0)
    np.testing.assert_array_equal(final(plain), local)
    still = jaxcomm.diloco(AXIS, 4, outer_learning_rate=0.0)
    np.testing.assert_array_equal(final(still), np.tile(q.x0, (4, 1)))


def test_one_worker_and_workers_with_equal_data_train_as_one():
    q = Quadratic(n=1)
    rule = jaxcomm.diloco(AXIS, 5)
    one = run(rule, optax.adam(0.05), q.loss, q.data, q.x0, 20)[0][0]
    same = jnp.tile(q.data, (8, 1))
    eight = run(rule, optax.adam(0.05), q.loss, same, q.x0, 20)[0][0]
    np.testing.assert_allclose(eight, jnp.tile(one, (8, 1)), rtol=1e-5)


@pytest.fixture(scope="module")
def ways():
    """The same DiLoCo with error feedback in the three modes: the step, states and branches."""
    q = Quadratic(n=8)
    outer = optax.chain(jaxcomm.error_feedback(jaxcomm.top_k(k=2), AXIS), NESTEROV)
    out = {}
    for name, kwargs in [("vmap", {"simulate": 8}), ("shard_map", {}), ("pmap", {"pmap": 8})]:
        step = jaxcomm.make_train_step(
            lambda p, b, k: q.loss(p["x"], b[0], k),
            optax.sgd(0.1, momentum=0.9),
            axis_name=AXIS,
            sync=jaxcomm.periodic(outer, 3),
            donate=False,
            **kwargs,
        )
        state = step.init({"x": jnp.asarray(q.x0)}, jax.random.key(0))
        states, branches = [state], []
        for _ in range(7):
            state, metrics = step(state, q.data)
            states.append(state)
            branches.append(np.asarray(metrics["branches"]).tolist())
        out[name] = (step, states, branches)
    return out


def test_three_modes_give_the_same_trajectory(ways):
    states = {name: jax.tree.map(np.asarray, _plain(way[1][-1])) for name, way in ways.items()}
    for other in ("shard_map", "pmap"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states["vmap"], states[other]
        )


def test_placement_and_bitwise_replicas(ways):
    for step, states, _ in ways.values():
        places = step.places
        per_worker = lambda tree: {place.value for place in jax.tree.leaves(tree)}
        assert per_worker(places.params) == {"per worker"}
        assert per_worker(places.sync_state.anchor) == {"replicated"}
        x = np.asarray(states[6].params["x"])
        assert (x == x[0]).all()
        assert (np.asarray(states[5].params["x"]) != x[0]).any()
        assert int(states[7].sync_state.sync_step) == 2


def test_nothing_travels_between_meetings(ways):
    for step, states, branches in ways.values():
        assert branches == [[0], [0], [1], [0], [0], [1], [0]]
        jaxpr = step.trace(states[0], jnp.zeros((8, 5)))
        assert collectives_outside_conditionals(jaxpr.jaxpr) == []


def test_a_run_continues_bit_for_bit_in_the_middle_of_a_round(ways):
    q = Quadratic(n=8)
    step, states, _ = ways["vmap"]
    saved = jax.tree.map(np.array, _plain(states[4]))
    state = jax.tree.map(jnp.asarray, saved)
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    for _ in range(3):
        state, _ = step(state, q.data)
    jax.tree.map(np.testing.assert_array_equal, _plain(state), _plain(states[7]))


def _plain(state):
    return state._replace(key=jax.random.key_data(state.key))


def test_error_feedback_outside_telescopes():
    q = Quadratic()
    outer = optax.chain(jaxcomm.error_feedback(jaxcomm.top_k(k=1), AXIS), optax.sgd(1.0))
    rule = jaxcomm.periodic(outer, 2)
    (_, _, state), seen = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 40)
    # z moved by the sum of what was sent; what each wanted to move is that plus its memory
    errors = np.asarray(state.outer[0].error).mean(0)
    x, z, wanted = np.asarray(seen, np.float64), q.x0.astype(np.float64), 0.0
    for t in range(0, 40, 2):
        before = np.tile(z, (4, 1))
        for _ in range(2):
            before = before - 0.1 * q.gradients(before)
        wanted, z = wanted + (z - before.mean(0)), x[0, t + 1]
    np.testing.assert_allclose(q.x0 - z + errors, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "outer",
    [
        jaxcomm.average(AXIS),
        optax.chain(jaxcomm.average(AXIS), optax.scale(-1.0)),
        optax.chain(jaxcomm.average(AXIS), optax.sgd(1.0)),
        optax.chain(optax.trace(0.0), jaxcomm.average(AXIS), optax.sgd(lambda count: 1.0)),
    ],
)
def test_every_way_to_write_local_sgd(outer):
    q = Quadratic()
    final = lambda rule: run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 6)[0][0]
    want = final(jaxcomm.local_sgd(AXIS, 3))
    np.testing.assert_array_equal(final(jaxcomm.periodic(outer, 3)), want)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (optax.sgd(0.7), "does not average"),
        (optax.chain(optax.clip(1.0), NESTEROV), "does not average"),
        (optax.chain(jaxcomm.average(AXIS)), "end it with an optimizer"),
        (optax.chain(optax.clip(1.0), jaxcomm.average(AXIS)), "end it with an optimizer"),
        (optax.chain(jaxcomm.average(AXIS), optax.scale_by_adam()), "end it with an optimizer"),
        (optax.chain(jaxcomm.average(("pods", "hosts"))), "end it with an optimizer"),
    ],
)
def test_outer_chains_that_cannot_work_are_refused(outer, message):
    with pytest.raises(ValueError, match=message):
        jaxcomm.periodic(outer, 3)


def test_what_cannot_be_tried_out_is_found_out_by_types():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    half = optax.masked(jaxcomm.average(AXIS), {"a": True, "b": False})
    rule = jaxcomm.periodic(optax.chain(half, optax.sgd(1.0)), 3)
    loss = lambda p, batch, key: jnp.sum(p["a"]) + jnp.sum(p["b"]) * jnp.mean(batch)
    step = jaxcomm.make_train_step(loss, optax.sgd(1.0), axis_name=AXIS, sync=rule, simulate=2)
    with pytest.raises(ValueError, match="does not average over the workers"):
        step.init(params, jax.random.key(0))
    step = jaxcomm.make_train_step(
        lambda p, batch, key: jnp.mean(batch - p),
        optax.chain(jaxcomm.average("chips"), optax.sgd(1.0)),
        axis_name=("hosts", "chips"),
        sync=jaxcomm.local_sgd("hosts", 3),
        simulate=(2, 2),
    )
    with pytest.raises(ValueError, match=r"along 'chips'.*give the rule all worker axes"):
        step.init(jnp.zeros(3), jax.random.key(0))
    # outer schedules may begin at zero, and tuples of axes are found one by one
    warm = optax.sgd(optax.linear_schedule(0.0, 0.7, 10))
    jaxcomm.periodic(optax.chain(jaxcomm.average(AXIS), warm), 3)
    jaxcomm.periodic(optax.chain(jaxcomm.average(("pods", "hosts")), NESTEROV), 3)


def test_inner_states_stay_or_are_averaged_or_begin_anew():
    q = Quadratic()
    tx = optax.chain(optax.adam(optax.linear_schedule(0.1, 0.0, 50)))
    states = {}
    for moments in ("local", "average", "reset"):
        rule = jaxcomm.local_sgd(AXIS, 5, moments=moments)
        (x, opt_state, _), _ = run(rule, tx, q.loss, q.data, q.x0, 10)
        states[moments] = jax.tree.map(np.asarray, opt_state[0])
        assert (np.asarray(x) == np.asarray(x)[0]).all()
    adam, clock = states["local"]
    assert np.abs(adam.mu - adam.mu[0]).max() > 1e-3
    assert states["average"][0].nu.std(0).max() < 1e-7
    assert states["average"][0].mu.std(0).max() < 1e-7
    assert (states["average"][0].count == 10).all()
    fresh, clock_after = states["reset"]
    assert not fresh.mu.any()
    assert not fresh.nu.any()
    assert not fresh.count.any()
    assert (clock.count == 10).all()
    assert (clock_after.count == 10).all()  # the learning rate's clock goes on


def test_moments_begin_anew_from_the_parameters_agreed_on():
    q, tx = Quadratic(n=2), optax.contrib.schedule_free_sgd(0.1)
    rule = jaxcomm.local_sgd(AXIS, 3, moments="reset")
    loss = lambda p, b, k: q.loss(p, b[0], k)
    step = jaxcomm.make_train_step(loss, tx, axis_name=AXIS, sync=rule, simulate=2)
    state = step.init(jnp.asarray(q.x0), jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, q.data)
    np.testing.assert_array_equal(state.opt_state.z, state.params)


def test_averaged_moments_move_only_at_meetings():
    q = Quadratic(n=8)
    step = jaxcomm.make_train_step(
        lambda p, b, k: q.loss(p, b[0], k),
        optax.adam(0.1),
        axis_name=AXIS,
        sync=jaxcomm.local_sgd(AXIS, 2, moments="average"),
    )
    state = step.init(jnp.asarray(q.x0), jax.random.key(0))
    assert collectives_outside_conditionals(step.trace(state, q.data).jaxpr) == []
    for taken in ([0, 0], [1, 1]):
        state, metrics = step(state, q.data)
        assert np.asarray(metrics["branches"]).tolist() == taken
    nu = np.asarray(state.opt_state[0].nu)
    assert (nu == nu[0]).all()


OUTER = {
    "ef21": lambda: optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=2), AXIS), NESTEROV),
    "one bit": lambda: optax.chain(
        jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase"), optax.adam(0.05)
    ),
    "stochastic": lambda: optax.chain(
        optax.trace(0.5),
        jaxcomm.compressed_average(jaxcomm.quantize(4, rounding="stochastic"), AXIS),
        optax.contrib.muon(0.1),
    ),
    "low rank": lambda: optax.chain(jaxcomm.power_sgd(1, AXIS), NESTEROV),
    "bare": lambda: jaxcomm.econtrol(jaxcomm.top_k(k=2), AXIS, eta=0.1),
}


@pytest.mark.parametrize("name", OUTER)
def test_any_outer_chain_is_accepted_and_keeps_replicas_equal(name):
    q = Quadratic(n=8, d=12)
    x0 = {"w": jnp.asarray(q.x0[:8]).reshape(4, 2), "b": jnp.asarray(q.x0[8:])}
    whole = lambda p: jnp.concatenate([p["w"].reshape(-1), p["b"]])
    step = jaxcomm.make_train_step(
        lambda p, b, k: q.loss(whole(p), b[0], k),
        optax.contrib.muon(0.05) if name == "stochastic" else optax.sgd(0.1),
        axis_name=AXIS,
        sync=jaxcomm.periodic(OUTER[name](), 3),
        simulate=8,
    )
    state = step.init(x0, jax.random.key(0))
    for _ in range(30):
        state, _ = step(state, q.data)
    excess = lambda x: 0.5 * np.sum(q.a * (np.asarray(x) - q.b.mean(0)) ** 2)
    finals = np.asarray(jax.vmap(whole)(state.params))
    assert (finals == finals[:1]).all()
    assert excess(finals[0]) < 0.5 * excess(q.x0)
    assert {p.value for p in jax.tree.leaves(step.places.sync_state.anchor)} == {"replicated"}


@pytest.mark.parametrize("moments", ["mean", None, jaxcomm.error_feedback(jaxcomm.sign(), AXIS)])
def test_moments_are_refused(moments):
    with pytest.raises((ValueError, TypeError), match="moments"):
        jaxcomm.periodic(jaxcomm.average(AXIS), 2, moments=moments)


def test_narrow_parameters_keep_their_dtype_and_a_float32_anchor():
    q = Quadratic()
    loss = lambda x, b, key: q.loss(x.astype(jnp.float32), b, key)
    rule = jaxcomm.local_sgd(AXIS, 2)
    (x, _, state), _ = run(rule, optax.sgd(0.01), loss, q.data, q.x0.astype(jnp.bfloat16), 4)
    assert x.dtype == jnp.bfloat16
    assert state.anchor.dtype == jnp.float32
    np.testing.assert_array_equal(x, state.anchor.astype(jnp.bfloat16))


def sparse_reference(q, rounds, every, k, decay, nu):
    """SparseLoCo with float32 values: anchors after every round."""
    z, e, history = q.x0.astype(np.float64), np.zeros((q.n, len(q.x0))), []
    for _ in range(rounds):
        x = np.tile(z, (q.n, 1))
        for _ in range(every):
            x = x - 0.1 * q.gradients(x)
        e = decay * e + (z - x)
        sent = np.where(np.abs(e) >= np.sort(np.abs(e), 1)[:, -k][:, None], e, 0)
        e, z = e - sent, z - nu * sent.mean(0)
        history.append(z)
    return np.stack(history)


def test_sparse_loco_follows_its_equations():
    q = Quadratic()
    rule = jaxcomm.sparse_loco(AXIS, 3, k=2, bits=None, outer_learning_rate=0.8)
    _, seen = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 30)
    want = sparse_reference(q, 10, 3, 2, 0.95, 0.8)
    np.testing.assert_allclose(np.asarray(seen)[0, 2::3], want, atol=1e-5)


def test_sparse_loco_that_sends_all_is_local_sgd():
    q = Quadratic()
    rule = jaxcomm.sparse_loco(AXIS, 3, density=1.0, bits=None, decay=0.0)
    got = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 30)[1]
    want = run(jaxcomm.local_sgd(AXIS, 3), optax.sgd(0.1), q.loss, q.data, q.x0, 30)[1]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_two_bits_of_few_coordinates_reach_the_same_place():
    q = Quadratic(d=64)
    rule = jaxcomm.sparse_loco(AXIS, 5, k=8, chunk_size=32)
    (x, _, _), _ = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 600)
    excess = lambda x: np.sum(q.a * (x - q.b.mean(0)) ** 2)
    # not further: a memory that decays forgets what was too small to be sent
    assert excess(np.asarray(x)[0]) < 3e-2 * excess(q.x0)
