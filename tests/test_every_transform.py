"""What holds for every transform: accumulated, with a NaN, saved and resumed, with weight decay.

A method that joins the library joins `METHODS` by a line.
"""

from collections.abc import Callable
from typing import NamedTuple

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import host, same
from composition import AXIS, PARAMS
from convex_problems import least_squares, least_squares_gradient, run

import jaxcomm
from jaxcomm.compressors import quantize, sign, top_k

K = top_k(0.2)


class Method(NamedTuple):
    """How a chain is made, and what its updates do when all gradients are zero."""

    make: Callable  # weight_decay -> chain
    shrinks: bool = True  # zero gradients: x <- (1 - rate decay) x


def direction(make):
    """A transform that keeps its input's direction, before AdamW."""
    return Method(lambda decay: optax.chain(make(), optax.adamw(0.01, weight_decay=decay)))


def optimizer(make, shrinks=True):
    return Method(lambda decay: make(0.01, AXIS, weight_decay=decay), shrinks)


METHODS = {
    "average": direction(lambda: jaxcomm.average(AXIS)),
    "compressed_average": direction(lambda: jaxcomm.compressed_average(quantize(bits=8), AXIS)),
    "error_feedback": direction(lambda: jaxcomm.error_feedback(K, AXIS, decay=0.9)),
    "two_phase": direction(lambda: jaxcomm.error_feedback(sign(), AXIS, exchange="two_phase")),
    "ef21": direction(
        lambda: jaxcomm.ef21(
            K, AXIS, momentum=0.3, double_momentum=True, participation=0.6, downlink=K
        )
    ),
    "ef21_w": direction(lambda: jaxcomm.ef21(K, AXIS, weight=jnp.array([0.1, 0.2, 0.3, 0.4]))),
    "flattened": direction(lambda: jaxcomm.flattened(jaxcomm.ef21(K, AXIS, momentum=0.3))),
    "ef21_plus": direction(lambda: jaxcomm.ef21_plus(K, AXIS)),
    "econtrol": direction(lambda: jaxcomm.econtrol(K, AXIS, eta=0.05)),
    "dgc": direction(
        lambda: jaxcomm.deep_gradient_compression(0.1, AXIS, clip_norm=1.0, warmup_steps=2)
    ),
    "power_sgd": direction(lambda: jaxcomm.power_sgd(1, AXIS, min_compression_rate=0)),
    "majority_vote": Method(direction(lambda: jaxcomm.majority_vote(AXIS)).make, shrinks=False),
    "signum": optimizer(jaxcomm.signum, shrinks=False),
    "demo": optimizer(lambda rate, axis, **kw: jaxcomm.demo(rate, axis, k=3, chunk=4, **kw)),
    "one_bit_adam": optimizer(lambda *a, **kw: jaxcomm.one_bit_adam(*a, freeze_step=2, **kw)),
    "one_bit_lamb": optimizer(
        lambda *a, **kw: jaxcomm.one_bit_lamb(*a, freeze_step=2, **kw), shrinks=False
    ),
    "zero_one_adam": optimizer(lambda *a, **kw: jaxcomm.zero_one_adam(*a, sync_every=2, **kw)),
}
QUICK = {"error_feedback", "ef21", "dgc", "demo", "signum"}  # others have such tests of their own
METHOD = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in METHODS]
)
BAD = 3


@METHOD
def test_accumulated_with_a_nan_and_resumed(name, tmp_path):
    """Behind a clip and two micro-steps: bytes at every second step, a NaN changes a counter only,
    and a checkpoint from the midst of an accumulation goes on bit for bit."""
    chain = optax.chain(optax.clip_by_global_norm(1.0), METHODS[name].make(0.1))
    step = jaxcomm.make_train_step(
        composition.loss_fn,
        jaxcomm.accumulate(chain, 2, AXIS),
        axis_name=AXIS,
        simulate=4,
        donate=False,
    )
    state = step.init(PARAMS, jax.random.key(0))
    report, states, sent = jaxcomm.traffic(step, state, composition.batch(0)), [host(state)], []
    checkpointer = jaxcomm.Checkpointer(tmp_path)
    for i in range(8):
        x, y = composition.batch(i)
        if i == BAD:
            x[2, 1] = np.nan
        state, metrics = step(state, (x, y))
        states.append(host(state))
        sent.append(report.step_bytes(np.asarray(metrics["branches"])))
        if i == 5:
            checkpointer.save(i + 1, state, data_state=None)
    before, after = states[BAD], states[BAD + 1]
    assert same(after._replace(step=before.step, skipped=before.skipped), before)
    assert (int(after.step), int(np.max(after.skipped))) == (BAD + 1, 1)
    micro = [int(optax.tree.get(s.opt_state, "micro_step")) for s in states]
    assert micro == [0, 1, 0, 1, 1, 0, 1, 0, 1]  # the skipped one does not count
    quiet = report.every_step_bytes  # the metrics
    assert quiet < 100
    exchanged = [i for i in range(8) if i != BAD and micro[i + 1] == 0]
    if name != "zero_one_adam":  # whose second half of the meetings sends nothing
        assert [i for i in range(8) if sent[i] > quiet and i != BAD] == exchanged
    assert all(sent[i] == quiet for i in range(8) if i not in (*exchanged, BAD))

    checkpointer.wait()
    again, _, _ = checkpointer.restore(step.abstract_state(PARAMS, jax.random.key(0)))
    for i in (6, 7):
        again, _ = step(again, composition.batch(i))
    assert same(host(again), states[-1])
    checkpointer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.shrinks])
def test_decay_is_not_communicated(name):
    """Zero gradients: x <- (1 - rate decay) x at every step, whatever the exchange loses.

    0/1 Adam decays from where the workers last met, here two steps ago at most.
    """
    step = jaxcomm.make_train_step(
        lambda params, batch, key: 0.0 * jnp.sum(params["w"]) * jnp.sum(batch),
        METHODS[name].make(0.5),
        axis_name=AXIS,
        simulate=4,
    )
    state = step.init(PARAMS, jax.random.key(0))
    for _ in range(4):
        state, _ = step(state, jnp.ones(4))
    share = (1 - 2 * 0.01 * 0.5) ** 2 if name == "zero_one_adam" else (1 - 0.01 * 0.5) ** 4
    left = jax.tree.map(lambda x: x * share, PARAMS)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, step.consensus(state), left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compressed_average", "two_phase", "majority_vote"])
def test_composes(name):
    """Groups, bfloat16, one worker: the methods whose own test files do not check it."""
    composition.check_all(lambda: METHODS[name].make(0.01), ends=optax.identity)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", METHODS)
def test_wide_numbers(name, dtype):
    """With jax_enable_x64, where new arrays are float64 unless told otherwise."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
        tx = METHODS[name].make(0.1)
        step = jaxcomm.make_train_step(composition.loss_fn, tx, axis_name=AXIS, simulate=4)
        state = step.init(params, jax.random.key(0))
        for i in range(3):
            state, _ = step(state, composition.batch(i))
        assert all(x.dtype == dtype for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("shape", [(6, 5), (5,)])
@pytest.mark.parametrize("name", ["dgc", "demo"])
def test_a_group_of_empty_leaves_is_replicated(name, shape):
    """A leaf without elements, alone in the group that is compressed or that stays dense."""
    loss = lambda params, batch, key: sum(jnp.sum(x) for x in params) * jnp.mean(batch)
    step = jaxcomm.make_train_step(loss, METHODS[name].make(0.1), axis_name=AXIS, simulate=4)
    params = [jnp.ones(shape), jnp.zeros((0, 3))]
    state = step.abstract_state(params, jax.random.key(0))
    assert [x.shape for x in state.params] == [shape, (0, 3)]


def test_hyperparameters_can_be_scheduled():
    """Under inject_hyperparams: what no other test injects."""
    decay = optax.inject_hyperparams(jaxcomm.error_feedback)(
        compressor=K, axis_name=AXIS, decay=optax.linear_schedule(0.5, 1.0, 3)
    )
    state = composition.check(optax.chain(decay, optax.adamw(1e-2)), simulate=2)
    assert float(state.opt_state[0].hyperparams["decay"]) == 1.0
    lamb = optax.inject_hyperparams(jaxcomm.one_bit_lamb)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 3), axis_name=AXIS, freeze_step=2
    )
    state = composition.check(lamb, simulate=2)
    np.testing.assert_allclose(state.opt_state.hyperparams["learning_rate"], 0.01, rtol=1e-5)


def test_virtual_iterate_of_classic_feedback():
    """x - gamma mean e follows SGD on the gradients at x: y <- y - gamma mean g, exactly."""
    data, _ = least_squares(50.0, 0)
    observe = lambda x, s, g: (x, s[0].error, g)
    tx = optax.chain(jaxcomm.error_feedback(top_k(k=5), AXIS), optax.sgd(0.01))
    gradient = least_squares_gradient(1.0)
    _, (x, e, g) = run(tx, gradient, data, np.zeros(50), 500, observe=observe)
    virtual = np.float64(x[0]) - 0.01 * np.float64(e).mean(0)
    steps = 0.01 * np.float64(g).mean(0)
    np.testing.assert_allclose(virtual[1:], virtual[:-1] - steps[:-1], atol=2e-4)
    assert 0.01 * np.abs(e).mean(0).max() > 0.05  # the errors are not idle


# ----- EF21's inequalities over many seeds, workers and problems, one program a family


def families(kind, seed, n=10, d=12):
    """(data, start, L, L_i) of one problem with very unequal workers, and f_i."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=n))
    a = rng.normal(size=(n, 20, d)) * scale[:, None, None] / np.sqrt(20)
    largest = lambda m: np.linalg.eigvalsh(m.T @ m)[-1]
    together = np.concatenate(a) / np.sqrt(n)
    if kind == "quadratic":
        b = rng.normal(size=(n, 20))
        constants, smooth = [largest(m) for m in a], largest(together)
    else:
        b = np.sign(rng.normal(size=(n, 20)))
        constants, smooth = [largest(m) / 4 + 0.2 for m in a], largest(together) / 4 + 0.2
    data = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    return data, rng.normal(size=d).astype(np.float32), smooth, np.array(constants)


def local_quadratic(x, row):
    return 0.5 * jnp.sum((row["a"] @ x - row["b"]) ** 2)


def local_logistic(x, row):
    """Non-convex: softplus is 1/4-smooth in a sum of 20 rows scaled by 1 / sqrt(20)."""
    return jnp.sum(jax.nn.softplus(-row["b"] * (row["a"] @ x))) + 0.1 * jnp.sum(x**2 / (1 + x**2))


SEEDS, ROUNDS = 24, 200


@pytest.mark.parametrize("kind", ["quadratic", "logistic"])
def test_bounds_of_ef21_over_many_problems(kind):
    """Both step sizes, 24 problems: contraction on every path, Lyapunov, averaged gradient."""
    local = {"quadratic": local_quadratic, "logistic": local_logistic}[kind]
    problems = [families(kind, seed) for seed in range(SEEDS)]
    data, start = jax.tree.map(lambda *x: np.stack(x), *[(p[0], p[1]) for p in problems])
    alpha = 2 / 12
    theta, beta, _ = jaxcomm.contraction_constants(alpha)
    rates = np.array(
        [
            [jaxcomm.ef21_step_size(p[2], p[3], alpha, rule=rule) for p in problems]
            for rule in ("qm", "am")
        ]
    )
    method = jaxcomm.ef21(top_k(k=2), AXIS)

    def track(data, start, gamma):
        def worker(row):
            def one_round(carry, _):
                x, state = carry
                value, g = jax.value_and_grad(local)(x, row)
                direction, state = method.update(g, state)
                return (x - gamma * direction, state), (value, g, state.local)

            return jax.lax.scan(one_round, (start, method.init(start)), length=ROUNDS)[1]

        return jax.vmap(worker, axis_name=AXIS)(data)

    over_seeds = jax.vmap(track)
    seen = jax.jit(jax.vmap(over_seeds, (None, None, 0)))(data, start, jnp.asarray(rates))
    value, g, estimate = (np.float64(leaf) for leaf in seen)  # (rule, seed, n, T, ...)
    f, square = value.mean(2), (g.mean(2) ** 2).sum(-1)
    error = ((estimate - g) ** 2).sum(-1)
    change = (np.diff(g, axis=3) ** 2).sum(-1)
    bound = (1 - theta) * error[..., :-1] + beta * change
    assert (error[..., 1:] <= bound * (1 + 1e-4) + 1e-7).all()

    for rule, constants in enumerate(("qm", "am")):
        for seed, (_, _, _, smooth) in enumerate(problems):
            gamma = rates[rule, seed]
            share = np.ones(10) if constants == "qm" else smooth / smooth.mean()  # n w_i
            total = (error[rule, seed] / share[:, None]).mean(0)
            psi = f[rule, seed] + gamma / (2 * theta) * total
            fall = gamma / 2 * square[rule, seed, :-1]
            assert (psi[1:] <= psi[:-1] - fall + 1e-5 * psi[0]).all(), (constants, seed)
            averaged = np.cumsum(square[rule, seed]) / np.arange(1, ROUNDS + 1)
            lowest = 0.0  # of f: sums of squares and of softplus
            limit = 2 * (f[rule, seed, 0] - lowest) / gamma + total[0] / theta
            assert (averaged <= limit / np.arange(1, ROUNDS + 1)).all(), (constants, seed)
    assert (rates[1] > 1.1 * rates[0]).all()
