"""Training apart and merging late, and averages of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_runs import AXIS, Quadratic, collectives_outside_conditionals, run

import jaxcomm
from jaxcomm.collectives.pairs import matchings
from jaxcomm.collectives.primitives import permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 16])
def test_matchings_contain_every_pair_once(n):
    found = matchings(n)
    pairs = sorted((i, j) for partner in found for i, j in enumerate(partner) if i < j)
    assert pairs == [(i, j) for i in range(n) for j in range(i + 1, n)]
    assert all(partner[partner[i]] == i for partner in found for i in range(n))
    assert len(found) == max(n - 1 + n % 2, 1)


def test_partners_swap_on_real_devices():
    partners = matchings(8)[2]
    x = jnp.arange(8.0)
    swap = lambda x: permute(x, AXIS, partners)
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(AXIS)
    real = jax.jit(jax.shard_map(swap, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_array_equal(real, np.arange(8.0)[list(partners)])
    np.testing.assert_array_equal(jax.vmap(swap, axis_name=AXIS)(x), real)


def gossip(x, rounds, *, probability, coin, seed=0):
    """Rounds without training: all workers' x after each, (rounds, n, d)."""
    rule = jaxcomm.single_merge(
        AXIS, 1, total_steps=rounds + 1, probability=probability, coin=coin, seed=seed
    )

    def worker(x):
        def one(carry, step):
            x, state = rule.apply(*carry, step)
            return (x, state), x

        return jax.lax.scan(one, (x, rule.init(x)), jnp.arange(1, rounds + 1))[1]

    return np.asarray(jax.jit(jax.vmap(worker, axis_name=AXIS))(x)).swapaxes(0, 1)


@pytest.mark.parametrize("coin", ["pair", "round"])
def test_gossip_keeps_the_mean_and_contracts_as_expected(coin):
    n, chance = 8, 0.4
    x = jnp.asarray(np.random.default_rng(0).normal(size=(n, 3)), jnp.float32)
    after = gossip(x, 3, probability=chance, coin=coin)
    np.testing.assert_allclose(after.mean(1), np.tile(x.mean(0), (3, 1)), atol=1e-6)
    spread = lambda x: np.asarray(((x - x.mean(0)) ** 2).sum())
    one = lambda x, number: _one_round(x, number, chance, coin)
    one = jax.jit(jax.vmap(one, in_axes=(0, None), axis_name=AXIS))
    shrinkage = [spread(one(x, number)) / spread(x) for number in range(300)]
    assert np.mean(shrinkage) == pytest.approx(1 - chance * n / (2 * (n - 1)), abs=0.03)


def _one_round(x, number, chance, coin):
    rule = jaxcomm.single_merge(AXIS, 1, total_steps=10**6, probability=chance, coin=coin)
    state = rule.init(x)._replace(sync_step=number)
    return rule.apply(x, state, jnp.int32(1))[0]


def test_everyone_averages_at_the_end_and_in_the_window():
    q = Quadratic()
    rule = jaxcomm.single_merge(
        AXIS, 4, total_steps=30, probability=lambda number: 0.0 * number, window=(2, 4)
    )
    _, seen = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 30)
    seen = np.asarray(seen)
    equal = [t + 1 for t in range(30) if (seen[:, t] == seen[:1, t]).all()]
    assert equal == [12, 16, 30]


def test_lo_fi_is_one_average_of_independent_runs():
    q = Quadratic()
    got = np.asarray(run(jaxcomm.lo_fi(AXIS, 20), optax.sgd(0.1), q.loss, q.data, q.x0, 20)[1])
    x = np.tile(q.x0.astype(np.float64), (4, 1))
    for t in range(20):
        x = x - 0.1 * q.gradients(x)
        want = x if t < 19 else np.tile(x.mean(0), (4, 1))
        np.testing.assert_allclose(got[:, t], want, atol=1e-5)
    # any order of the workers, and averaging lowers the variance of noise by n
    turned = run(jaxcomm.lo_fi(AXIS, 20), optax.sgd(0.1), q.loss, q.data[::-1], q.x0, 20)[0][0]
    np.testing.assert_allclose(turned, got[:, -1], atol=1e-6)


def test_averaging_lowers_the_variance_of_noise_by_the_number_of_workers():
    n, d = 16, 400
    noisy = lambda x, b, key: 0.5 * jnp.sum(x**2) + jnp.vdot(jax.random.normal(key, (d,)), x)
    observe = lambda params, state, opt_state: jnp.mean(params**2)
    rule = jaxcomm.lo_fi(AXIS, 60)
    _, seen = run(rule, optax.sgd(0.1), noisy, jnp.zeros(n), jnp.zeros(d), 60, observe=observe)
    before, after = np.asarray(seen)[:, -2].mean(), np.asarray(seen)[0, -1]
    assert before / after == pytest.approx(n, rel=0.2)


def test_only_the_drawn_pairing_travels():
    q = Quadratic(n=8)
    step = jaxcomm.make_train_step(
        lambda p, b, k: q.loss(p, b[0], k),
        optax.sgd(0.1),
        axis_name=AXIS,
        sync=jaxcomm.single_merge(AXIS, 2, total_steps=6, probability=1.0),
    )
    state = step.init(jnp.asarray(q.x0), jax.random.key(0))
    assert collectives_outside_conditionals(step.trace(state, q.data).jaxpr) == []
    for t in range(6):
        before = np.asarray(state.params)
        state, metrics = step(state, q.data)
        taken = dict(zip(step.choice_names, np.asarray(metrics["branches"]).tolist()))
        exchanges = [name for name, branch in taken.items() if branch == 1]
        # the round's end, and then either everyone's average or one of seven matchings
        assert len(exchanges) == (2 if t % 2 else 0)
        if t == 3:
            x = np.asarray(state.params)
            assert len(np.unique(x.round(6), axis=0)) == 4  # four pairs, each of one mind
            local = before - 0.1 * q.gradients(before)
            np.testing.assert_allclose(x.mean(0), local.mean(0), atol=1e-6)
    assert (np.asarray(state.params) == np.asarray(state.params)[0]).all()


# The mixture of sheet I.2: eight classes in R^16, each of eight agents holds two adjacent ones.
CLASSES, AGENTS, ROUNDS, STEPS = 8, 8, 100, 20


def mixture(seed):
    rng = np.random.default_rng(seed)
    means = rng.normal(0, 1.1, (CLASSES, 16))
    draw = lambda labels: means[labels] + rng.normal(size=(*labels.shape, 16))
    labels = (np.arange(AGENTS)[:, None] + rng.integers(0, 2, (AGENTS, 400))) % CLASSES
    test = rng.integers(0, CLASSES, 4000)
    arrays = draw(labels).astype(np.float32), labels, draw(test).astype(np.float32), test
    return [jnp.asarray(a) for a in arrays]


def mlp(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def initial(key):
    one, two = jax.random.split(key)
    scaled = lambda k, i, o: jax.random.normal(k, (i, o)) * np.sqrt(2 / i)
    return {
        "w1": scaled(one, 16, 48),
        "b1": jnp.zeros(48),
        "w2": scaled(two, 48, CLASSES),
        "b2": jnp.zeros(CLASSES),
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def accuracies(data, same_init, full, chance, seed):
    """Global test accuracy: mean over local models before the last meeting, and of the merged."""
    x, labels, x_test, y_test = data
    rule = jaxcomm.single_merge(
        AXIS,
        STEPS,
        total_steps=ROUNDS * STEPS,
        probability=lambda number: chance,
        window=(0, ROUNDS) if full else (0, 0),
    )
    accuracy = lambda params: (mlp(params, x_test).argmax(-1) == y_test).mean()

    def agent(x, labels, number):
        def one(carry, step):
            params, state, _ = carry
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
            rows = jax.random.randint(key, (32,), 0, 400)
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
                mlp(p, x[rows]), labels[rows]
            ).mean()
            grads = jax.grad(loss)(params)
            local = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
            return (*rule.apply(local, state, step), local), None

        start = jax.random.fold_in(jax.random.key(seed), 0 if same_init else 1 + number)
        params = initial(start)
        carry = (params, rule.init(params), params)
        (merged, _, local), _ = jax.lax.scan(one, carry, jnp.arange(1, ROUNDS * STEPS + 1))
        return accuracy(local), accuracy(merged)

    local, merged = jax.vmap(agent, axis_name=AXIS)(x, labels, jnp.arange(AGENTS))
    return local.mean(), merged[0]


@pytest.mark.slow
def test_a_single_merge_suffices_if_agents_talk_a_little():
    """The table of sheet I.2 (mean local model, merged model), within the spread over seeds."""
    table = {
        (0.0, False): (0.25, 0.27),
        (0.0, True): (0.25, 0.57),
        (0.2, False): (0.71, 0.95),
        (0.2, True): (0.75, 0.94),
        (1.0, False): (0.95, 0.97),
        ("full", False): (0.96, 0.96),
    }
    for (chance, same_init), want in table.items():
        full = chance == "full"
        chance = 0.0 if full else chance
        got = [accuracies(mixture(s), same_init, full, chance, s) for s in range(4)]
        got = np.asarray(got)
        spread = 2 * got.std(0, ddof=1) + 0.02
        assert (np.abs(got.mean(0) - want) < spread).all(), (chance, same_init, got)
        luck = chance == 0 and not full  # merging strangers
        assert spread[1] < (0.5 if luck else 0.08)
        assert spread[0] < 0.15


def test_averages_of_the_last_meetings_and_of_all():
    q = Quadratic()
    for last, start in ((None, 0), (None, 9), (3, 0), (50, 0)):
        rule = jaxcomm.weight_average(jaxcomm.diloco(AXIS, 4), last=last, start=start)
        (_, _, state), seen = run(rule, optax.sgd(0.1), q.loss, q.data, q.x0, 26)
        met = np.asarray(seen)[0, 3::4]
        assert (np.asarray(state.sync_step) == 6).all()
        met = met[2:] if start else met
        want = met.mean(0) if last is None else met[-last:].mean(0)
        own = jax.tree.map(lambda x: x[0], state)
        got = jaxcomm.averaged_weights(own, last=last)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_weight_averages_keep_the_hooks_and_the_training():
    q = Quadratic(n=8)
    inner = jaxcomm.local_sgd(AXIS, 2, moments="average")
    states = {}
    for name, rule in (("plain", inner), ("averaged", jaxcomm.weight_average(inner, last=2))):
        step = jaxcomm.make_train_step(
            lambda p, b, k: q.loss(p, b[0], k),
            optax.adam(0.1),
            axis_name=AXIS,
            sync=rule,
            simulate=8,
        )
        state = step.init(jnp.asarray(q.x0), jax.random.key(0))
        for _ in range(5):
            state, _ = step(state, q.data)
        states[name] = state
    np.testing.assert_array_equal(states["plain"].params, states["averaged"].params)
    np.testing.assert_array_equal(
        states["plain"].opt_state[0].nu, states["averaged"].opt_state[0].nu
    )
    assert states["averaged"].sync_state.weights.shape == (2, 5)


def test_weight_averages_need_an_anchor():
    q = Quadratic(n=8)
    for rule in (
        jaxcomm.single_merge(AXIS, 2, total_steps=10),
        jaxcomm.eager_diloco(AXIS, 2),
    ):
        step = jaxcomm.make_train_step(
            lambda p, b, k: q.loss(p, b[0], k),
            optax.sgd(0.1),
            axis_name=AXIS,
            sync=jaxcomm.weight_average(rule),
            simulate=8,
        )
        with pytest.raises(ValueError, match="share one anchor"):
            step.init(jnp.asarray(q.x0), jax.random.key(0))


def test_statistics_are_estimated_anew():
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.normal(2.0, 3.0, (50, 64, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    statistics = lambda w, x: {"mean": (x @ w).mean(0), "square": ((x @ w) ** 2).mean(0)}
    got = jaxcomm.reestimate(statistics, w, batches)
    want = np.asarray(batches).reshape(-1, 4) @ np.asarray(w)
    np.testing.assert_allclose(got["mean"], want.mean(0), rtol=1e-4)
    np.testing.assert_allclose(got["square"], (want**2).mean(0), rtol=1e-4)
    each = lambda part: jaxcomm.reestimate(statistics, w, part, axis_name=AXIS)
    shares = jax.vmap(each, axis_name=AXIS)(batches.reshape(5, 10, 64, 4))
    np.testing.assert_allclose(shares["mean"], np.tile(got["mean"], (5, 1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxcomm.single_merge(AXIS, 2, total_steps=4, probability=1.5), "got 1.5"),
        (lambda: jaxcomm.single_merge(AXIS, 2, total_steps=4, coin="both"), "got 'both'"),
        (lambda: jaxcomm.single_merge(AXIS, 0, total_steps=4), "every=0"),
        (lambda: jaxcomm.single_merge(AXIS, 2, total_steps=0), "total_steps"),
        (lambda: jaxcomm.weight_average(jaxcomm.local_sgd(AXIS, 2), last=0), "got 0"),
        (lambda: jaxcomm.weight_average(jaxcomm.local_sgd(AXIS, 2), start=-1), "got -1"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
