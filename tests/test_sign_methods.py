"""signSGD with majority vote and Signum: the vote, its wire, and where signs alone fail."""

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convex_problems import AXIS, run

import jaxcomm
from jaxcomm.compressors import sign
from jaxcomm.transforms import error_feedback, majority_vote, sign_sgd, signum


def vote(gradients, count=0):
    """Everyone's result of one vote on (n, d) gradients."""
    tx = majority_vote(AXIS)

    def one(g):
        state = tx.init(g)._replace(count=jnp.int32(count))
        return tx.update(g, state)[0]

    everyone = jax.jit(jax.vmap(one, axis_name=AXIS))
    return np.asarray(everyone(jnp.asarray(gradients, jnp.float32)))


@pytest.mark.parametrize(("n", "d"), [(1, 5), (3, 7), (4, 1), (5, 64), (8, 100)])
def test_is_the_sign_of_the_sum_of_signs(n, d):
    gradients = np.random.default_rng(n * d).normal(size=(n, d))
    result = vote(gradients)
    sums = np.sign(gradients).sum(0)
    expected = np.where(sums == 0, 1.0, np.sign(sums))
    np.testing.assert_array_equal(result, np.broadcast_to(expected, (n, d)))


def test_ties_and_zeros_alternate():
    gradients = np.array([[1.0, 0.0, 0.0, 2.0], [-1.0, 0.0, 3.0, 2.0]])
    np.testing.assert_array_equal(vote(gradients, 0)[0], [1, 1, 1, 1])
    np.testing.assert_array_equal(vote(gradients, 1)[0], [-1, -1, -1, 1])


def test_unused_parameters_stay_where_they_are():
    data = {"b": np.ones((3, 2), np.float32)}
    gradient = lambda x, data, key: jnp.array([1.0, 0.0]) * data["b"]
    _, x = run(sign_sgd(0.1, AXIS), gradient, data, np.zeros(2), 50)
    np.testing.assert_allclose(x[0, -1], [-4.9, -0.1], rtol=1e-5)
    assert np.abs(x[0, :, 1]).max() < 0.1 + 1e-6


def test_a_minority_that_lies_changes_nothing():
    """Flipping fewer than half of unanimous voters, differently at each coordinate."""
    rng = np.random.default_rng(0)
    honest = np.broadcast_to(rng.normal(size=40), (7, 40)) * rng.uniform(0.1, 9, size=(7, 40))
    flips = np.argsort(rng.random((7, 40)), axis=0) < 3
    np.testing.assert_array_equal(vote(np.where(flips, -1e6 * honest, honest)), vote(honest))


def test_one_bit_a_coordinate_each_way():
    """36 coordinates over 4 workers: parts of 16 bits, 2 bytes."""
    sent = [x for x in composition.wire(sign_sgd(1e-3, AXIS)) if x[1] == "votes"]
    assert [(name[:10], shape, dtype) for name, _, shape, dtype in sent] == [
        ("all_to_all", (4, 2), "uint8"),
        ("all_gather", (2,), "uint8"),
    ]


def test_signum_votes_with_momentum():
    data = {"b": np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)}
    noisy = lambda x, data, key: x - data["b"] + 3 * jax.random.normal(key, x.shape)
    observe = lambda x, s, g: (x, g)
    _, (x, g) = run(signum(0.01, AXIS, momentum=0.8), noisy, data, np.ones(6), 40, observe=observe)
    m = np.zeros((5, 6))
    for t in range(39):
        m = 0.8 * m + 0.2 * np.float64(g[:, t])
        np.testing.assert_allclose(
            x[0, t + 1], x[0, t] - 0.01 * np.sign(np.sign(m).sum(0)), atol=1e-6
        )
    _, votes = run(signum(0.01, AXIS, momentum=0.0), noisy, data, np.ones(6), 40)
    np.testing.assert_array_equal(votes, run(sign_sgd(0.01, AXIS), noisy, data, np.ones(6), 40)[1])


@pytest.mark.parametrize("make", [sign_sgd, signum])
def test_updates_have_the_dtype_of_the_gradients(make):
    tx, g = make(0.1, AXIS, weight_decay=0.5), jnp.ones((3, 4), jnp.bfloat16)
    update = jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name=AXIS)
    assert jax.eval_shape(update, g).dtype == jnp.bfloat16


def test_decay_is_decoupled():
    data = {"b": np.ones((2, 1), np.float32)}
    tx = sign_sgd(0.1, AXIS, weight_decay=0.5)
    _, x = run(tx, lambda x, data, key: data["b"], data, np.array([2.0]), 2)
    np.testing.assert_allclose(x[0, 1], 2.0 - 0.1 * (1.0 + 0.5 * 2.0), rtol=1e-6)


# ----- the counter-examples of Karimireddy et al. 2019


def scaled_sign(gamma):
    return optax.chain(error_feedback(sign(), AXIS), optax.sgd(gamma))


def test_skewed_noise_leads_signs_to_the_wrong_end():
    """On [-1, 1], slope 4 with probability 1/4, else -1: mean 1/4, so that the optimum is -1."""
    data = {"b": np.zeros((1, 1), np.float32)}
    skewed = lambda x, data, key: jnp.where(jax.random.bernoulli(key, 0.25, (1,)), 4.0, -1.0)
    clip = jaxcomm.proximal_step(lambda x: jnp.clip(x, -1.0, 1.0))
    _, wrong = run(optax.chain(sign_sgd(0.005, AXIS), clip), skewed, data, np.zeros(1), 3000)
    _, right = run(optax.chain(scaled_sign(0.005), clip), skewed, data, np.zeros(1), 3000)
    assert wrong[0, -500:].mean() > 0.95
    assert right[0, -500:].mean() < -0.9


def test_signs_cannot_leave_a_line():
    """f = eps |x + y| + |x - y|: sign steps are +-(1, -1), and x + y never changes."""

    def gradient(x, data, key):
        g = 0.5 * jnp.sign(x[0] + x[1]) + jnp.sign(x[0] - x[1]) * jnp.array([1.0, -1.0])
        return g + data["b"]

    data = {"b": np.zeros((1, 1), np.float32)}
    start = np.array([1.0, 0.53])
    _, x = run(sign_sgd(0.01, AXIS), gradient, data, start, 1000)
    np.testing.assert_allclose(x[0].sum(-1), start.sum(), atol=1e-4)
    rate = optax.chain(
        error_feedback(sign(), AXIS), optax.sgd(optax.linear_schedule(0.02, 0.0, 1000))
    )
    _, x = run(rate, gradient, data, start, 1000)
    assert np.abs(x[0, -1]).max() < 0.05


@pytest.mark.slow
def test_composes():
    composition.check_all(lambda: signum(1e-2, AXIS), ends=optax.identity)
    composition.check(optax.chain(majority_vote(AXIS), optax.adamw(1e-2)), simulate=2)
    injected = optax.inject_hyperparams(signum)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 3), axis_name=AXIS, momentum=0.5
    )
    composition.check(injected, simulate=2)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="momentum must be in"):
        signum(0.1, AXIS, momentum=1.0)
