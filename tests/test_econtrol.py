"""EControl: EF21 at eta = 0, exact virtual iterates, and the paper's least squares."""

import composition
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convex_problems import AXIS, index, least_squares, least_squares_gradient, run, top_k_numpy

import jaxcomm
from jaxcomm.compressors import identity, top_k
from jaxcomm.transforms import econtrol, ef21, error_feedback

N, D, GAMMA = 5, 50, 0.01


def chain(direction, gamma=GAMMA):
    return optax.chain(direction, optax.sgd(gamma))


def econtrol_numpy(data, k, eta, gamma, steps):
    """The paper's algorithm, written plainly in float64."""
    a, b = data["a"][:, None].astype(np.float64), data["b"].astype(np.float64)
    x, e, h = np.zeros(D), np.zeros((N, D)), np.zeros((N, D))
    trajectory = []
    for _ in range(steps):
        trajectory.append(x)
        g = a * (a * x - b)
        message = np.stack([top_k_numpy(v, k) for v in eta * e + g - h])
        e, h = e + g - h - message, h + message
        x = x - gamma * h.mean(0)
    return np.stack(trajectory)


def test_matches_the_algorithm_as_written():
    data, _ = least_squares(50.0, 0)
    _, seen = run(
        chain(econtrol(top_k(k=5), AXIS, eta=0.1)), least_squares_gradient(), data, np.zeros(D), 60
    )
    reference = econtrol_numpy(data, 5, 0.1, GAMMA, 60)
    np.testing.assert_allclose(seen[0], reference, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(seen[0], seen[3])


def test_without_feedback_it_is_ef21_bit_for_bit():
    data, _ = least_squares(50.0, 1)
    gradient = least_squares_gradient(1.0)
    both = [
        run(chain(method), gradient, data, np.zeros(D), 200)
        for method in (econtrol(top_k(k=5), AXIS, eta=0.0), ef21(top_k(k=5), AXIS))
    ]
    np.testing.assert_array_equal(both[0][1], both[1][1])
    np.testing.assert_array_equal(both[0][0][1][0].local, both[1][0][1][0].local)


def test_virtual_iterate_mean_of_estimates_and_fixed_point():
    """x - gamma mean e follows SGD; mean h_i = h; h_i finds the gradients at the optimum."""
    data, solution = least_squares(50.0, 2)
    observe = lambda x, s, g: (x, s[0].error, s[0].local, s[0].mean, g)
    (_, final), (x, e, h, h_mean, g) = run(
        chain(econtrol(top_k(k=5), AXIS, eta=0.05)),
        least_squares_gradient(),
        data,
        np.zeros(D),
        3000,
        observe=observe,
    )
    virtual = np.float64(x[0]) - GAMMA * np.float64(e).mean(0)
    step = GAMMA * np.float64(g).mean(0)
    np.testing.assert_allclose(virtual[1:], virtual[:-1] - step[:-1], atol=2e-4)
    np.testing.assert_allclose(np.mean(h, 0), h_mean[0], atol=2e-4)
    at_optimum = data["a"][:, None] * (data["a"][:, None] * solution - data["b"])
    np.testing.assert_allclose(final[0].local, at_optimum, atol=1e-3)
    np.testing.assert_allclose(np.mean(at_optimum, 0), 0, atol=1e-4)
    assert np.abs(e[:, -1]).max() < 1e-3 < np.abs(e[:, 10]).max()


def test_theory_step_converges():
    """eta = alpha / 400 and gamma = alpha / (10 L_QM), as `econtrol_step_size` promises."""
    data, solution = least_squares(50.0, 4)
    alpha = top_k(k=5).alpha(D)
    gamma = jaxcomm.econtrol_step_size(np.float64(data["a"]) ** 2, alpha)
    method = econtrol(top_k(k=5), AXIS, eta=jaxcomm.econtrol_eta(alpha))
    (x, _), _ = run(chain(method, gamma), least_squares_gradient(), data, np.zeros(D), 10_000)
    assert np.linalg.norm(x[0] - solution) < 1e-4 * np.linalg.norm(solution)


def test_identity_compressor_is_sgd():
    data, _ = least_squares(50.0, 3)
    gradient = least_squares_gradient(1.0)
    (_, state), seen = run(
        chain(econtrol(identity(), AXIS, eta=0.05)), gradient, data, np.zeros(D), 50
    )
    _, dense = run(chain(jaxcomm.average(AXIS)), gradient, data, np.zeros(D), 50)
    np.testing.assert_allclose(seen[0], dense[0], atol=1e-4)
    assert not np.any(state[0].error)


# Relative distance to the solution after 8,000 rounds, one seed of the sheet: P3 with n = 5,
# d = 50, zeta = 50, Top-5, eta = 0.05. None stands for convergence, here to float32's accuracy.
GOLDEN = {
    # (sigma, gamma): EC, EC-Ideal, EF21, EControl
    (0.0, 0.02): (0.079, None, None, None),
    (0.0, 0.005): (0.0215, None, None, None),
    (1.0, 0.005): (0.0207, 0.0028, 0.0101, 0.0042),
    (10.0, 0.005): (0.038, 0.028, 0.103, 0.042),
}
METHODS = {
    "EC": lambda: error_feedback(top_k(k=5), AXIS),
    "EC-Ideal": lambda: error_feedback(top_k(k=5), AXIS),  # on gradients less those at the optimum
    "EF21": lambda: ef21(top_k(k=5), AXIS),
    "EControl": lambda: econtrol(top_k(k=5), AXIS, eta=0.05),
}


def final_errors(method, settings, seeds):
    """Relative distance after 8,000 rounds, shape (settings, seeds), in one compiled scan."""
    problems = [least_squares(50.0, seed) for seed in range(seeds)]
    data = jax.tree.map(lambda *x: jnp.stack(x), *(data for data, _ in problems))
    solutions = jnp.asarray(np.stack([s for _, s in problems]), jnp.float32)

    def one(setting, data, solution, seed):
        sigma, gamma = setting

        def worker(data):
            tx = chain(METHODS[method](), gamma)

            def one_round(carry, t):
                x, state = carry
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), index())
                g = data["a"] * (data["a"] * x - data["b"])
                g = g + sigma * jax.random.normal(key, x.shape)
                if method == "EC-Ideal":
                    g = g - data["a"] * (data["a"] * solution - data["b"])
                updates, state = tx.update(g, state, x)
                return (optax.apply_updates(x, updates), state), None

            x = jnp.zeros(D)
            return jax.lax.scan(one_round, (x, tx.init(x)), jnp.arange(8000))[0][0]

        x = jax.vmap(worker, axis_name=AXIS)(data)[0]
        return jnp.linalg.norm(x - solution) / jnp.linalg.norm(solution)

    over_seeds = jax.vmap(one, (None, 0, 0, 0))
    run_all = jax.jit(jax.vmap(over_seeds, ((0, 0), None, None, None)))
    settings = tuple(jnp.asarray(values) for values in zip(*settings))
    return np.asarray(run_all(settings, data, solutions, jnp.arange(seeds)))


def test_error_feedback_stalls_where_econtrol_converges():
    """Without noise, on the sheet's own data (its seed is the second)."""
    errors = {name: final_errors(name, [(0.0, 0.005)], 2)[0] for name in ("EC", "EControl")}
    np.testing.assert_allclose(errors["EC"][1], 0.0215, rtol=0.02)
    assert errors["EControl"].max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_golden_table(method):
    """Over eight seeds, the sheet's figure is within the spread, and near the mean."""
    column = list(METHODS).index(method)
    errors = final_errors(method, list(GOLDEN), 8)
    for row, golden in zip(errors, GOLDEN.values()):
        if golden[column] is None:
            assert row.max() < 1e-5
        else:
            assert abs(row.mean() - golden[column]) < 3 * row.std(ddof=1), (row, golden[column])
            np.testing.assert_allclose(row.mean(), golden[column], rtol=0.25)


def test_composes():
    composition.check_all(lambda: econtrol(top_k(0.2), AXIS, eta=0.1))
    scheduled = optax.inject_hyperparams(econtrol)(
        compressor=top_k(0.2), axis_name=AXIS, eta=optax.linear_schedule(0.0, 0.1, 3)
    )
    composition.check(optax.chain(scheduled, optax.adamw(1e-2)), simulate=2)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="eta must not be negative"):
        econtrol(top_k(k=1), AXIS, eta=-0.1)
    with pytest.raises(TypeError, match="compressor must be a jaxcomm compressor"):
        econtrol(AXIS, top_k(k=1))
