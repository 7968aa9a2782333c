"""One-bit optimizers: the paper's equations in NumPy, the safety rule, the freeze, the bytes."""

import functools
import math

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import AXIS
from convex_problems import run
from jax.sharding import AxisType

import jaxcomm
from jaxcomm.compressors import identity, sign
from jaxcomm.traffic import traffic
from jaxcomm.training.workers import Place
from jaxcomm.transforms import (
    TrustRatio,
    average,
    error_feedback,
    local_step_intervals,
    one_bit_adam,
    one_bit_lamb,
    variance_intervals,
    zero_one_adam,
)

N, D, LR = 4, 24, 0.01
NOISE = np.random.default_rng(3).normal(size=(N, 200, D)).astype(np.float32)
CURVATURE = np.random.default_rng(4).uniform(0.5, 2.0, size=(N, D)).astype(np.float32)


def noisy_gradient(x, data, t):
    """A quadratic of every worker's own, and unit noise: no variance is small."""
    return data["h"] * (x - 1.0) + data["noise"][t]


def trajectory(tx, steps, gradient=noisy_gradient, start=jnp.zeros(D)):
    """Everyone's x, state and gradient before each step; leaves (n, steps, ...)."""

    def worker(data):
        def one_step(carry, t):
            x, state = carry
            g = gradient(x, data, t)
            updates, new = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), new), (x, state, g)

        return jax.lax.scan(one_step, (start, tx.init(start)), jnp.arange(steps))[1]

    data = {"h": jnp.asarray(CURVATURE), "noise": jnp.asarray(NOISE)}
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(worker, axis_name=AXIS))(data))


def sign_numpy(v):
    """The l2 one-bit codec over a whole vector."""
    return np.where(v < 0, -1, 1) * np.linalg.norm(v) / np.sqrt(v.size)


def two_phase_numpy(b, s):
    """Compressed all-reduce of the sheet's B.2: rows of b are workers, rows of s their chunks."""
    sent = np.stack([sign_numpy(row) for row in b])
    z = sent.mean(0).reshape(N, -1) + s
    out = np.stack([sign_numpy(row) for row in z])
    return out.reshape(-1), b - sent, z - out


def one_bit_adam_numpy(steps, freeze, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    """1-bit Adam as written in the paper, with Adam's bias correction."""
    x, m, v, e, s = np.zeros(D), np.zeros(D), np.zeros(D), np.zeros((N, D)), np.zeros((N, D // N))
    xs = []
    for t in range(1, steps + 1):
        xs.append(x)
        g = CURVATURE * (x - 1.0) + NOISE[:, t - 1]
        if t <= freeze:
            m, v = b1 * m + (1 - b1) * g.mean(0), b2 * v + (1 - b2) * g.mean(0) ** 2
        else:
            m, e, s = two_phase_numpy(b1 * m + (1 - b1) * g + e, s)
        root = np.sqrt(v / (1 - b2 ** min(t, freeze))) + eps
        x = x - LR * (m / (1 - b1**t) / root + weight_decay * x)
    return np.stack(xs)


# 1-bit Adam


def test_warm_up_is_adamw_on_the_mean():
    rate = optax.linear_schedule(0.0, LR, 10)
    ours = one_bit_adam(rate, AXIS, freeze_step=30, weight_decay=0.1)
    theirs = optax.chain(average(AXIS), optax.adamw(rate, weight_decay=0.1))
    x, state, _ = trajectory(ours, 31)
    np.testing.assert_allclose(x, trajectory(theirs, 31)[0], rtol=1e-6, atol=1e-7)
    assert state[0].frozen_at[0].tolist() == [-1] * 30 + [30]


@pytest.mark.parametrize("max_update", [None, math.inf])
def test_is_the_papers_algorithm_where_the_safety_rule_does_not_bind(max_update):
    """Also: one compressed mean, v frozen bit for bit, the errors telescope."""
    steps, freeze = 60, 20
    tx = one_bit_adam(LR, AXIS, freeze_step=freeze, weight_decay=0.1, max_update=max_update)
    x, (state, *_), g = trajectory(tx, steps)
    np.testing.assert_array_equal(x[0], x[3])
    np.testing.assert_allclose(x[0], one_bit_adam_numpy(steps, freeze, 0.1), rtol=2e-4, atol=2e-5)
    assert np.ptp(np.abs(x[0, -1] - x[0, freeze])) > 0.01  # it moves, and not as signSGD
    m, v = state.mu, state.nu
    np.testing.assert_array_equal(m[0], m[3])
    assert (v[:, freeze:] == v[:, freeze : freeze + 1]).all()
    assert (v[:, freeze] != v[:, freeze - 1]).all()
    sent = 0.9 * m[0, freeze:-1] + 0.1 * g[:, freeze:-1].mean(0)
    e, s = state.error[:, -1].mean(0), state.server_error[:, -1].reshape(-1)
    np.testing.assert_allclose(m[0, freeze + 1 :].sum(0) + e + s, sent.sum(0), atol=1e-5)


def test_identity_codec_is_momentum_with_a_frozen_preconditioner():
    freeze = 20
    tx = one_bit_adam(LR, AXIS, freeze_step=freeze, compressor=identity())
    x, (state, *_), g = trajectory(tx, 50)
    m, root = state.mu[0, freeze], np.sqrt(state.nu[0, freeze] / (1 - 0.999**freeze))
    y = x[0, freeze]
    for t in range(freeze, 49):
        m = 0.9 * m + 0.1 * g[:, t].mean(0)
        y = y - LR * m / (1 - 0.9 ** (t + 1)) / (root + 1e-8)
    np.testing.assert_allclose(x[:, -1], np.tile(y, (N, 1)), rtol=1e-5, atol=1e-6)
    assert not state.error.any()


BOUND = 0.1 / math.sqrt(1e-3)  # of Adam's steps: what max_update=None stands for


def quadratic(make, problem, noise=0.0, steps=1000, limits=(math.inf, BOUND)):
    """Loss relative to the start's, shape (limits, steps); everyone's gradient is noisy apart."""
    start, curvature, rate = PROBLEMS[problem]
    curvature, start = jnp.asarray(curvature, jnp.float32), jnp.asarray(start, jnp.float32)
    loss = lambda x: 0.5 * jnp.sum(curvature * x**2)
    observe = lambda x, s, g: loss(x)

    def gradient(x, data, key):
        return curvature * (x + noise * jax.random.normal(key, start.shape))

    def one(limit):
        tx = make(rate, max_update=limit)
        return run(tx, gradient, jnp.zeros(N), start, steps, observe=observe)[1][0]

    return np.asarray(jax.vmap(one)(jnp.array(limits)) / loss(start))


def check_safe(make, problem, end=0.05):
    """Frozen at 100: the textbook jumps above the start, ours never rises, and comes down."""
    textbook, ours = quadratic(make, problem)
    assert textbook[100:].max() > 1.2, textbook[100:].max()
    assert ours[100:].max() < 1.1 * ours[100], ours[100:].max()
    assert ours[-1] < end * ours[100], ours[-1]


SPREAD = 10 ** np.random.default_rng(0).uniform(-6, 1, 200)
START = np.random.default_rng(1).normal(size=200)
PROBLEMS = {  # start, curvature, learning rate
    "targets around zero": (START, np.ones(200), 0.01),
    "half at the optimum": (np.where(np.arange(200) < 100, START, 1e-7), np.ones(200), 0.01),
    "spread start": (SPREAD / 10, np.ones(200), 0.001),
    "spread curvature": (START, SPREAD, 0.01),
}


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_noiseless_quadratics_are_safe(problem):
    make = functools.partial(one_bit_adam, axis_name=AXIS, freeze_step=100)
    check_safe(make, problem, end=0.5 if problem == "spread start" else 0.05)


def test_with_gradient_noise_it_ends_where_adam_ends():
    make = functools.partial(one_bit_adam, axis_name=AXIS, freeze_step=100)
    adam = lambda rate, max_update: optax.chain(average(AXIS), optax.adam(rate))
    noisy = functools.partial(quadratic, problem="targets around zero", noise=1.0, steps=1500)
    textbook, ours = noisy(make)[:, -500:].mean(1)
    dense = noisy(adam, limits=(BOUND,))[:, -500:].mean()
    np.testing.assert_allclose(ours, dense, rtol=0.2)
    np.testing.assert_allclose(ours, textbook, rtol=0.05)


def test_rows_never_hit_stay_put_and_take_part_in_no_error():
    """An embedding of which half the rows are in no batch (spec B.7)."""
    hit = np.arange(D) < D // 2
    gradient = lambda x, data, t: jnp.where(hit, noisy_gradient(x, data, t), 0.0)
    tx = one_bit_adam(LR, AXIS, freeze_step=20)
    x, (state, *_), _ = trajectory(tx, 60, gradient=gradient)
    assert not x[..., ~hit].any()
    assert not state.mu[..., ~hit].any()
    assert not state.error[..., ~hit].any()
    assert (x[:, -1, hit] != x[:, 20, hit]).all()


def test_automatic_freeze_follows_the_papers_rule():
    """Shrinking gradients: frozen at the first update whose norm is 0.96 of 10 updates before."""
    gradient = lambda x, data, t: data["noise"][t] * (0.1 + jnp.exp(-t / 30.0))
    b2 = 0.9
    tx = one_bit_adam(0.0, AXIS, b2=b2)
    _, (state, *_), g = trajectory(tx, 150, gradient=gradient)
    v, norms = np.zeros(D), []
    for t in range(1, 150):
        v = b2 * v + (1 - b2) * g[:, t - 1].mean(0) ** 2
        norms.append(np.abs(v / (1 - b2**t)).sum())
    due = [t for t in range(11, 150) if norms[t - 1] >= 0.96 * norms[t - 11]]
    seen = state.frozen_at[0]
    assert 20 < due[0] < 140
    assert seen[-1] == due[0]
    assert (seen[: due[0]] == -1).all()
    assert (seen[due[0] :] == due[0]).all()
    waits = one_bit_adam(0.0, AXIS, b2=b2, warmup_steps=due[0] + 1)
    later = trajectory(waits, 150, gradient=gradient)[1][0].frozen_at[0, -1]
    assert later == next(t for t in due if t > due[0])


@pytest.mark.slow
def test_freezing_is_what_makes_one_bit_work():
    """The paper's motivating figure: 1-bit gradients in an unfrozen Adam end worse (spec B.7)."""
    rng = np.random.default_rng(0)
    scale = jnp.asarray(10 ** rng.uniform(-2, 0, 100), jnp.float32)  # sizes of the features
    target = jnp.asarray(rng.normal(size=100), jnp.float32)

    def gradient(x, data, key):
        a = scale * jax.random.normal(key, (8, 100))
        return a.T @ (a @ (x - target) + 0.1 * jax.random.normal(key, (8,))) / 8

    loss = lambda x, s, g: jnp.sum((scale * (x - target)) ** 2)
    end = lambda tx: float(
        run(tx, gradient, jnp.zeros(N), jnp.zeros(100), 1000, observe=loss)[1][0, -1]
    )
    rate = optax.cosine_decay_schedule(0.01, 1000)
    one_bit = end(one_bit_adam(rate, AXIS, freeze_step=200))
    dense = end(one_bit_adam(rate, AXIS, freeze_step=200, compressor=identity()))
    naive = error_feedback(sign("l2"), AXIS, exchange="two_phase")
    unfrozen = end(optax.chain(naive, optax.adam(rate)))
    assert one_bit < 1.2 * dense < 0.05
    assert unfrozen > 5 * one_bit


def test_bytes_of_both_stages():
    """At least 31 times fewer bytes than dense float32 once v is frozen (8 workers)."""
    d, n = 100_000, 8
    tx = one_bit_adam(LR, AXIS, freeze_step=10)
    step = jaxcomm.make_train_step(
        lambda p, batch, key: jnp.sum(p * batch), tx, axis_name=AXIS, simulate=n
    )
    state = jax.eval_shape(step.init, jnp.zeros(d), jax.random.key(0))
    report = traffic(step, state, jnp.zeros(n))
    metrics, dense = report.by("part")["metrics"], report.dense_equivalent_bytes
    assert report.step_bytes([0]) == dense + metrics
    one_bit = report.step_bytes([1]) - metrics
    # d bits in n chunks to and fro, and a scale with each
    assert one_bit == 2 * (n - 1) * (math.ceil(d / n / 8) + 4)
    assert dense / one_bit > 31


# 0/1 Adam


def zero_one_adam_numpy(steps, every, variance_steps, b1=0.9, b2=0.999, eps=1e-8):
    """0/1 Adam as written, with Adam's bias corrections: everyone's x before each step."""
    x, m, v, u = np.zeros((N, D)), np.zeros((N, D)), np.zeros(D), np.zeros((N, D))
    z, e, s, xs, rates, learned = np.zeros(D), np.zeros((N, D)), np.zeros((N, D // N)), [], 0.0, 0
    for t in range(1, steps + 1):
        xs.append(x)
        g = CURVATURE * (x - 1.0) + NOISE[:, t - 1]
        if t - 1 in variance_steps:
            v, learned = b2 * v + (1 - b2) * g.mean(0) ** 2, learned + 1
        root, rate = np.sqrt(v / (1 - b2**learned)) + eps, LR / (1 - b1**t)
        m = b1 * m + (1 - b1) * g
        u, rates, x = u + rate * m, rates + rate, x - rate * m / root
        if t % every == 0:
            mean, e, s = two_phase_numpy(u + e, s)
            z = z - mean / root
            m, x = np.tile(mean / rates, (N, 1)), np.tile(z, (N, 1))
            u, rates = np.zeros((N, D)), 0.0
    return np.stack(xs, 1)


def test_zero_one_adam_is_the_papers_algorithm():
    """Also: replicas are equal after a meeting and differ between two."""
    learn = {0, 1, 2, 4, 6, 10, 14, 22, 30}
    tx = zero_one_adam(
        LR,
        AXIS,
        sync_every=4,
        variance_every=variance_intervals(2),
        variance_stop=38,
        max_update=math.inf,
    )
    x, state, _ = trajectory(tx, 61)
    np.testing.assert_allclose(x, zero_one_adam_numpy(61, 4, learn), rtol=1e-3, atol=2e-4)
    assert (state.anchor == state.anchor[:1]).all()
    assert (state.nu == state.nu[:1]).all()
    assert set(np.flatnonzero(np.diff(state.nu_count[0]))) == learn
    np.testing.assert_allclose(x[:, 4::4], state.anchor[:, 4::4], rtol=3e-7, atol=1e-8)
    assert (np.ptp(x[:, 5::4], 0) > 0).any(-1).all()
    assert (state.moved[:, 4::4] == 0).all()


def test_zero_one_adam_with_everything_exchanged_is_adamw():
    options = {"sync_every": 1, "variance_every": 1, "weight_decay": 0.1, "max_update": math.inf}
    ours = zero_one_adam(LR, AXIS, compressor=identity(), **options)
    theirs = optax.chain(average(AXIS), optax.adamw(LR, weight_decay=0.1))
    np.testing.assert_allclose(
        trajectory(ours, 40)[0], trajectory(theirs, 40)[0], rtol=1e-4, atol=1e-6
    )
    from_zero = zero_one_adam(optax.linear_schedule(0.0, LR, 10), AXIS)
    x, state, _ = trajectory(from_zero, 20)
    assert np.isfinite(x).all()
    assert not x[:, 1].any()
    assert (np.ptp(state.mu[:, 1], 0) > 0).all()  # nothing was moved: momenta stay apart


def test_zero_one_adam_means_the_momenta_of_a_round():
    """Identity codec: m after a meeting is the mean of the round's momenta, weighted by rate."""
    tx = zero_one_adam(LR, AXIS, sync_every=5, compressor=identity())
    _, state, g = trajectory(tx, 31)
    m, window = state.mu[:, 25], []  # after 25 steps, all have met
    assert (m == m[:1]).all()
    for t in range(26, 31):
        m = 0.9 * m + 0.1 * g[:, t - 1]
        window.append(m.mean(0) / (1 - 0.9**t))
    weight = sum(1 / (1 - 0.9**t) for t in range(26, 31))
    np.testing.assert_allclose(state.mu[0, 30], sum(window) / weight, rtol=1e-4, atol=1e-6)


def test_zero_one_adam_meets_only_after_moves():
    """Rates of zero in every fourth step: what the memories hold is applied or still held."""
    rate = lambda t: jnp.where(t % 4 == 3, 0.0, LR)
    tx = zero_one_adam(rate, AXIS, b1=0.0, variance_stop=1, max_update=math.inf)
    x, state, g = trajectory(tx, 30)
    moved = -(state.anchor[0, -1] - x[0, 0]) * np.abs(g[:, 0].mean(0))  # v stays that of step 0
    held = state.error[:, -1].mean(0) + state.server_error[:, -1].reshape(-1)
    sums = (np.asarray(rate(np.arange(29)))[:, None] * g[:, :-1].mean(0)).sum(0)
    np.testing.assert_allclose(moved + held, sums, atol=1e-5)
    assert (np.diff(state.next_sync[0, 3:7]) == [0, 2, 1]).all()  # the fourth step waits


def test_zero_one_adam_is_safe_on_a_noiseless_quadratic():
    options = {"sync_every": 4, "variance_stop": 100}
    make = functools.partial(zero_one_adam, axis_name=AXIS, **options)
    check_safe(make, "spread curvature")


def test_intervals_of_the_paper():
    def walk(interval, end):
        steps, t = [], 0
        while t < end:
            steps.append(t)
            t += int(interval(t))
        return steps

    assert walk(variance_intervals(2), 62) == [0, 1, 2, 4, 6, 10, 14, 22, 30, 46]
    kappa, end = 16, 1000
    expected, k = [], 0
    for j in range(end):
        expected.append(k)
        k += 2 ** (j // kappa)
    assert walk(variance_intervals(kappa), end) == [k for k in expected if k < end]
    interval = jax.vmap(local_step_intervals(start=10, scaler=3, longest=12))(jnp.arange(40))
    assert interval.tolist() == [1] * 13 + [2] * 3 + [4] * 3 + [8] * 3 + [12] * 18
    assert int(local_step_intervals(0, 1, 16)(2**30)) == 16


def test_zero_one_adam_sends_nothing_between_meetings_and_runs_alike_in_two_modes():
    make = lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        zero_one_adam(0.05, AXIS, sync_every=3, variance_stop=2, weight_decay=0.01),
    )
    step, state, _ = composition.train(make(), steps=6, simulate=4)
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded, other, _ = composition.train(make(), steps=6, mesh=mesh)
    assert step.places.params["w"] is sharded.places.params["w"] is Place.PER_WORKER
    assert step.places.opt_state[1].anchor["w"] is Place.REPLICATED
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, step.consensus(state), sharded.consensus(other))
    report = traffic(step, state, composition.batch(0))
    metrics = report.by("part")["metrics"]
    assert report.step_bytes([0, 0]) == metrics  # neither variance nor meeting
    assert report.step_bytes([1, 0]) == report.dense_equivalent_bytes + metrics
    assert metrics < report.step_bytes([0, 1]) < report.step_bytes([1, 0])


def test_zero_one_adam_with_bfloat16_in_groups_and_for_one_worker():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), composition.PARAMS)
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    dense = optax.chain(average(AXIS), optax.sgd(0.1))
    own = lambda: zero_one_adam(0.05, AXIS, sync_every=2, weight_decay=0.1, mask=matrices)
    groups = optax.multi_transform(
        {"own": own(), "dense": dense}, {"w": "own", "b": "dense", "scale": "dense"}
    )
    _, state, _ = composition.train(groups, params=narrow, simulate=2)
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.params["w"].shape == (2, 6, 5)
    np.testing.assert_array_equal(state.params["w"][0], state.params["w"][1])
    injected = optax.inject_hyperparams(zero_one_adam)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10), axis_name=AXIS, sync_every=2
    )
    _, state, losses = composition.train(injected, steps=6, simulate=1)
    assert losses[-1] < losses[0]


# 1-bit LAMB

LEAVES = {"a": slice(0, 16), "b": slice(16, 24)}  # of the D coordinates; a starts at 1, b at 0


def lamb_gradient(x, data, t):
    """Tensor b has gradients a hundred times larger."""
    split = lambda v: {name: v[where] for name, where in LEAVES.items()}
    flat = jnp.concatenate([x["a"], x["b"]])
    scale = {"a": 1.0, "b": 100.0}
    return {k: scale[k] * v for k, v in split(noisy_gradient(flat, data, t)).items()}


def lamb_trajectory(tx, steps):
    start = {"a": 2.0 * jnp.ones(16), "b": jnp.zeros(8)}
    return trajectory(tx, steps, gradient=lamb_gradient, start=start)


def one_bit_lamb_numpy(steps, freeze, wd, b1=0.9, b2=0.999, eps=1e-6):
    """1-bit LAMB as in the sheet's B.5, with bias corrections; trust ratios in [0.01, 10]."""
    x, m, v = np.concatenate([2.0 * np.ones(16), np.zeros(8)]), np.zeros(D), np.zeros(D)
    e, s, scale, w, xs = np.zeros((N, D)), np.zeros((N, D // N)), np.ones(D), None, []
    average, last = dict.fromkeys(LEAVES, 0.0), dict.fromkeys(LEAVES, 1.0)
    size = np.concatenate([np.ones(16), 100.0 * np.ones(8)])
    rms = lambda y: np.sqrt(np.mean(y**2))
    for t in range(1, steps + 1):
        xs.append(x)
        g = size * (CURVATURE * (x - 1.0) + NOISE[:, t - 1])
        if t <= freeze:
            m, v = b1 * m + (1 - b1) * g.mean(0), b2 * v + (1 - b2) * g.mean(0) ** 2
            w = v
        else:
            old = m
            m, e, s = two_phase_numpy(scale * (b1 * m + (1 - b1) * g) + e, s)
            m = m / scale
            w = b2 * w + (1 - b2) * ((m - b1 * old) / (1 - b1)) ** 2
        root = np.sqrt(v / (1 - b2 ** min(t, freeze))) + eps
        adam = m / (1 - b1**t) / root
        u, new = adam + wd * x, x.copy()
        for name, k in LEAVES.items():
            if t <= freeze:
                norms = np.linalg.norm(x[k]), np.linalg.norm(u[k])
                c = np.clip(norms[0] / norms[1], 0.01, 10.0) if min(norms) > 0 else 1.0
                if c != 1:
                    average[name] = 0.9 * average[name] + 0.1 * c if average[name] else c
            else:
                factor = np.max(root[k] / (np.sqrt(w[k] / (1 - b2**t)) + eps))
                share = min(1.0, np.linalg.norm(adam[k]) / np.linalg.norm(u[k]))
                factor = np.clip(factor * share + 1 - share, 0.5, 4.0)
                last[name] = np.clip(factor, 0.9 * last[name], 1.1 * last[name])
                c = average[name] * last[name]
            new[k] = x[k] - LR * c * u[k]
        if t == freeze:
            sizes = {name: rms(m[k]) for name, k in LEAVES.items()}
            for name, k in LEAVES.items():
                scale[k] = np.mean(list(sizes.values())) / sizes[name]
        x = new
    return np.stack(xs)


def test_one_bit_lamb_is_the_papers_algorithm():
    steps, freeze = 45, 15
    tx = one_bit_lamb(LR, AXIS, freeze_step=freeze, weight_decay=0.1)
    x, (state, *_), _ = lamb_trajectory(tx, steps)
    flat = np.concatenate([x["a"], x["b"]], -1)
    np.testing.assert_array_equal(flat[0], flat[3])
    np.testing.assert_allclose(
        flat[0], one_bit_lamb_numpy(steps, freeze, 0.1), rtol=1e-3, atol=1e-3
    )
    for name in LEAVES:  # v stays bit for bit, w goes on
        assert (state.nu[name][:, freeze:] == state.nu[name][:, freeze : freeze + 1]).all()
        assert (np.diff(state.fresh[name], axis=1) != 0).any(-1).all()
    size = [np.sqrt(np.mean(state.mu[name][0, freeze] ** 2)) for name in LEAVES]
    scaled = state.scales[0, freeze] * size
    np.testing.assert_allclose(scaled, np.mean(size), rtol=1e-5)
    assert size[1] > 30 * size[0]
    assert (state.scales[:, :freeze] == 1).all()
    factors = state.factors[0, freeze:]
    assert (np.abs(np.diff(factors, axis=0) / factors[:-1]) < 0.1 + 1e-5).all()


def test_one_bit_lamb_warms_up_as_lamb():
    tx = one_bit_lamb(LR, AXIS, freeze_step=50, weight_decay=0.1, trust=TrustRatio(0.0, math.inf))
    lamb = optax.chain(average(AXIS), optax.lamb(LR, weight_decay=0.1))
    ours, theirs = (lamb_trajectory(t, 30)[0] for t in (tx, lamb))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_a_tensor_without_a_trust_ratio_still_moves():
    """Frozen after one step, in which tensor b was zero: its ratio is 1."""
    x, (state, *_), _ = lamb_trajectory(one_bit_lamb(LR, AXIS, freeze_step=1), 4)
    assert state.ratios[0, -1, 1] == 0
    assert (x["b"][:, 3] != x["b"][:, 2]).any()


def test_one_bit_lamb_is_safe_on_a_noiseless_quadratic():
    make = functools.partial(one_bit_lamb, axis_name=AXIS, freeze_step=100)
    check_safe(make, "spread curvature")


OPTIMIZERS = {
    "one_bit_adam": lambda **kw: one_bit_adam(0.05, AXIS, freeze_step=2, weight_decay=0.01, **kw),
    "one_bit_lamb": lambda **kw: one_bit_lamb(0.05, AXIS, freeze_step=2, weight_decay=0.01, **kw),
    "zero_one_adam": lambda: zero_one_adam(0.05, AXIS, sync_every=2, weight_decay=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_bit_adam", "one_bit_lamb"])
def test_composes(name):
    composition.check_all(OPTIMIZERS[name], ends=optax.identity)


def test_as_the_outer_optimizer_of_local_steps():
    """One bit a coordinate at every third step; parameters meet, and the loss falls."""
    outer = one_bit_adam(0.05, AXIS, freeze_step=2)
    rule = jaxcomm.periodic(outer, every=3)
    _step, state, losses = composition.train(optax.sgd(0.02), steps=12, simulate=4, sync=rule)
    assert int(optax.tree.get(state.sync_state, "frozen_at")) == 2
    assert int(state.sync_state.sync_step) == 4
    np.testing.assert_array_equal(state.params["w"][0], state.params["w"][3])
    assert losses[-1] < losses[0]


def test_inject_hyperparams():
    schedule = optax.linear_schedule(0.05, 0.01, 4)
    options = {"axis_name": AXIS, "freeze_step": 2}
    injected = optax.inject_hyperparams(one_bit_adam)(learning_rate=schedule, **options)
    state = composition.check(injected, simulate=2)
    assert int(optax.tree.get(state.opt_state, "frozen_at")) == 2
    plain = composition.check(one_bit_adam(schedule, **options), simulate=2)
    np.testing.assert_allclose(state.params["w"], plain.params["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "static"), [({"freeze_step": 2}, ()), ({}, ("variance_window",))]
)
def test_a_window_under_inject_hyperparams(options, static):
    """It may be injected where the freeze is given, and b2 where the window is static."""
    injected = optax.inject_hyperparams(one_bit_adam, static_args=static)
    tx = injected(0.05, AXIS, variance_window=3, **options)
    step = jaxcomm.make_train_step(composition.loss_fn, tx, axis_name=AXIS, simulate=2)
    state = step.abstract_state(composition.PARAMS, jax.random.key(0))
    step.trace(state, composition.batch(0))


@pytest.mark.parametrize(
    "name", ["one_bit_adam", pytest.param("one_bit_lamb", marks=pytest.mark.slow), "zero_one_adam"]
)
def test_saved_and_resumed_and_a_nan(name):
    """Bit for bit after a trip through the host; a NaN on one worker changes a counter only."""
    step = jaxcomm.make_train_step(
        composition.loss_fn, OPTIMIZERS[name](), axis_name=AXIS, pmap=4, donate=False
    )
    start = step.init(composition.PARAMS, jax.random.key(0))

    def go(state, steps):
        for i in steps:
            state = step(state, composition.batch(i))[0]
        return state

    middle = go(start, range(3))
    copy = lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
    ends = go(middle, range(3, 6)), go(jax.tree.map(copy, middle), range(3, 6))
    jax.tree.map(np.testing.assert_array_equal, *(end._replace(key=0) for end in ends))
    x, y = composition.batch(3)
    x[1, 2] = np.nan
    skipped, metrics = step(middle, (x, y))
    jax.tree.map(np.testing.assert_array_equal, skipped.opt_state, middle.opt_state)
    jax.tree.map(np.testing.assert_array_equal, skipped.params, middle.params)
    assert int(metrics["skipped"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_step": 0}, "freeze_step must be at least 1, got 0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"max_update": 0.0}, "max_update must be positive, got 0.0"),
        ({"variance_window": 0}, "variance_window must be at least 1, got 0"),
        ({"b2": jnp.float32(0.9)}, r"b2 \(without freeze_step .* name it in static_args"),
        ({"variance_window": jnp.int32(3)}, "variance_window .* name it in static_args"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        one_bit_adam(0.1, AXIS, **options)
    with pytest.raises(TypeError, match="compressor must be a jaxcomm compressor"):
        one_bit_adam(0.1, AXIS, compressor="sign")
