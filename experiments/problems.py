"""The papers' convex and small non-convex problems: n local functions with known constants.

Every problem is f(x) = (1/n) sum_i f_i(x); worker i has row i of every leaf of `data`. Noise of
size sigma is added to a gradient by adding sigma <z, x> to the loss, z normal from the step's key;
`recorded` noise is NumPy's instead, the same in every run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """n local functions."""

    local: Callable[[jax.Array, Any], jax.Array]  # (x, row of data) -> f_i(x)
    loss: Callable[[jax.Array, Any, jax.Array], jax.Array]  # (x, row, key) -> f_i(x) + noise
    data: Any  # leaves with leading axis n
    start: np.ndarray  # x of the first round
    smoothness: float  # L of f
    worker_smoothness: tuple[float, ...]  # the L_i
    solution: np.ndarray | None = None  # x*, where it is known
    noise: Callable[[int], np.ndarray] | None = None  # rounds -> recorded noise, (rounds, n, d)

    @property
    def workers(self) -> int:
        """n."""
        return len(self.worker_smoothness)

    def exact(self, x: jax.Array) -> jax.Array:
        """f(x), no noise."""
        return jnp.mean(jax.vmap(lambda row: self.local(x, row))(self.data))

    def gradients(self, x) -> jax.Array:
        """Everyone's gradient at x, no noise, worker axis first."""
        return jax.vmap(jax.grad(self.local), (None, 0))(jnp.asarray(x, jnp.float32), self.data)

    def batch(self, noise: jax.Array | None = None):
        """What the workers get in a round, given its recorded noise, (n, d), if there is any."""
        return self.data if noise is None else self.data | {"noise": noise}


def _problem(
    local, data, start, smoothness, worker_smoothness, solution=None, *, sigma=0.0, rows=None
) -> Problem:
    """`rows`: so many rows of a worker's data, drawn anew in every round, make its minibatch."""

    def loss(x, row, key):
        if "noise" in row:
            return local(x, row) + sigma * jnp.vdot(row["noise"], x)
        value = local(x, row if rows is None else _pick(row, rows, key))
        return value + sigma * jnp.vdot(jax.random.normal(key, x.shape), x) if sigma else value

    data = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), data)
    constants = tuple(float(s) for s in worker_smoothness)
    start = np.asarray(start, np.float32)
    return Problem(local, loss, data, start, float(smoothness), constants, solution)


def _pick(row, number: int, key: jax.Array):
    total = len(jax.tree.leaves(row)[0])
    chosen = jax.random.choice(key, total, (number,), replace=False)
    return jax.tree.map(lambda a: a[chosen], row)


def _largest(hessian) -> float:
    return np.linalg.eigvalsh(hessian)[-1]


def divergence() -> Problem:
    """P1: naive Top-1 without feedback diverges (Beznosikov et al. 2020, arXiv 2002.12410)."""
    a = np.array([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], float)
    hessians = [2 * np.outer(v, v) + 0.5 * np.eye(3) for v in a]
    local = lambda x, row: (row["a"] @ x) ** 2 + 0.25 * x @ x
    constants = [_largest(h) for h in hessians]
    return _problem(
        local, {"a": a}, np.ones(3), _largest(sum(hessians) / 3), constants, np.zeros(3)
    )


def quadratics(n=50, d=20, spikes=(100, 200, 400, 800, 1600), seed=0) -> Problem:
    """E2: quadratics whose smoothness constants are one, but for a few spikes.

    f_i = x' A_i x / 2 - b_i' x, A_i = Q_i diag(l_i linspace(.01, 1, d)) Q_i', Q_i and b_i random.
    """
    rng = np.random.default_rng(seed)
    levels = np.r_[np.ones(n - len(spikes)), spikes]
    q = np.stack([np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in levels])
    hessians = np.einsum("n,nij,j,nkj->nik", levels, q, np.linspace(0.01, 1, d), q)
    b = rng.normal(size=(n, d))
    mean = hessians.mean(0)
    local = lambda x, row: 0.5 * x @ (row["a"] @ x) - row["b"] @ x
    solution = np.linalg.solve(mean, b.mean(0))
    data = {"a": hessians, "b": b}
    return _problem(local, data, np.zeros(d), _largest(mean), levels, solution)


def least_squares(
    n=5, d=50, zeta=50.0, sigma=0.0, recorded=False, constants=True, seed=0
) -> Problem:
    """P3: heterogeneous least squares f_i = ||A_i z - b_i||^2 / 2, A_i^2 = ((i+1)^2 / n) I.

    Written in x = z - z*, which starts at -z*, so that rounding stays small beside the distances:
    f_i = a_i^2 ||x||^2 / 2 + c_i' x. Without the `constants` c_i, which sum to zero, EF21, EControl
    and EC-Ideal are the same in exact arithmetic, and classic feedback becomes EC-Ideal.
    """
    rng = np.random.default_rng(seed)
    i = np.arange(1, n + 1)
    scale = i / np.sqrt(n)
    b = rng.normal(size=(n, d)) * (zeta / i)[:, None]
    solution = (scale[:, None] * b).sum(0) / (scale**2).sum()
    c = scale[:, None] * (scale[:, None] * solution - b) * constants
    local = lambda x, row: 0.5 * row["curvature"] * x @ x + row["c"] @ x
    smooth = scale**2
    data = {"curvature": smooth, "c": c}
    noise = lambda rounds: np.random.default_rng(0).normal(size=(rounds, n, d)).astype(np.float32)
    problem = _problem(local, data, -solution, smooth.mean(), smooth, np.zeros(d), sigma=sigma)
    return problem._replace(noise=noise) if recorded else problem


def noisy_quadratic(n=1, sigma=1.0) -> Problem:
    """P4: f = ||x||^2 / 2 in R^2 with three-point noise, on which EF21-SGD with Top-1 stalls."""
    points = np.sqrt(3 * sigma**2 / 10) * np.array([[2, 0], [0, 1], [-2, -1]], np.float32)
    local = lambda x, row: 0.5 * x @ x + row["zero"]

    def loss(x, row, key):
        return local(x, row) + jnp.asarray(points)[jax.random.randint(key, (), 0, 3)] @ x

    problem = _problem(local, {"zero": np.zeros(n)}, [1.0, 1.0], 1.0, [1.0] * n, np.zeros(2))
    return problem._replace(loss=loss)


def diagonal(n=4, d=200, decades=0.0, sigma=0.0, seed=1) -> Problem:
    """B.7: f_i = sum_j h_j x_j^2 / 2, the same for all workers, from a normal start.

    log10 h is uniform over the decades that end at 10; with none, h = 1.
    """
    h = 10 ** np.random.default_rng(0).uniform(1 - decades, 1, d) if decades else np.ones(d)
    local = lambda x, row: 0.5 * jnp.sum(row["h"] * x**2)
    start = np.random.default_rng(seed).normal(size=d)
    data = {"h": np.tile(h, (n, 1))}
    return _problem(local, data, start, h.max(), [h.max()] * n, np.zeros(d), sigma=sigma)


def logistic(
    n=20,
    d=50,
    examples=100,
    penalty=0.1,
    spread=1.0,
    convex=False,
    sigma=0.0,
    rows=None,
    seed=0,
) -> Problem:
    """P2: logistic regression, worker i's features scaled by exp(spread * normal).

    The penalty is non-convex, sum x_j^2 / (1 + x_j^2), or with `convex` ||x||^2 / 2.
    """
    rng = np.random.default_rng(seed)
    scale = np.exp(spread * rng.normal(size=n))
    a = rng.normal(size=(n, examples, d)) * scale[:, None, None] / np.sqrt(d)
    truth = rng.normal(size=(n, d)) * 0.5 + rng.normal(size=d)
    b = np.sign(np.einsum("nmd,nd->nm", a, truth) + 0.1 * rng.normal(size=(n, examples)))

    def local(x, row):
        fit = jnp.mean(jax.nn.softplus(-row["b"] * (row["a"] @ x)))
        return fit + penalty * (0.5 * x @ x if convex else jnp.sum(x**2 / (1 + x**2)))

    constants, smoothness = _smoothness(a, 0.25, penalty * (1 if convex else 2))
    data = {"a": a, "b": b}
    return _problem(local, data, np.zeros(d), smoothness, constants, sigma=sigma, rows=rows)


def regression(
    n=100,
    d=10,
    examples=10,
    penalty=0.0,
    spread=0.0,
    decades=0.0,
    label_noise=0.1,
    rows=None,
    seed=0,
) -> Problem:
    """Least squares of one teacher, f_i = mean_j (a_j' x - b_j)^2 / 2 + the non-convex penalty.

    Worker i's features are scaled by exp(spread * normal), feature j by 10^-uniform(0, decades).
    """
    rng = np.random.default_rng(seed)
    scale = np.exp(spread * rng.normal(size=n))
    a = rng.normal(size=(n, examples, d)) * scale[:, None, None]
    a = a * 10 ** -rng.uniform(0, decades, d)
    b = a @ rng.normal(size=d) + label_noise * rng.normal(size=(n, examples))

    def local(x, row):
        fit = 0.5 * jnp.mean((row["a"] @ x - row["b"]) ** 2)
        return fit + penalty * jnp.sum(x**2 / (1 + x**2)) if penalty else fit

    constants, smoothness = _smoothness(a, 1.0, 2 * penalty)
    everything = a.reshape(-1, d)
    solution = None if penalty else np.linalg.lstsq(everything, b.reshape(-1), rcond=None)[0]
    data = {"a": a, "b": b}
    return _problem(local, data, np.zeros(d), smoothness, constants, solution, rows=rows)


def _smoothness(a: np.ndarray, curvature: float, penalty: float):
    """The L_i and L of a generalised linear model on features (n, examples, d)."""
    bound = lambda m: curvature * _largest(m.T @ m / len(m)) + penalty
    return [bound(m) for m in a], bound(a.reshape(-1, a.shape[-1]))


def rare_features(n=20, features=2, curvature=0.2, seed=3) -> Problem:
    """A.6: every worker has features of its own, which nobody else has (owners = 1).

    f_i = x' A_i x / 2 - b_i' x on the worker's block, with curvatures from `curvature` to 1.
    """
    rng, d = np.random.default_rng(seed), n * features
    a = np.zeros((n, d, d))
    for i in range(n):
        block = slice(features * i, features * (i + 1))
        q = np.linalg.qr(rng.normal(size=(features, features)))[0]
        a[i, block, block] = q @ np.diag(np.linspace(curvature, 1, features)) @ q.T
    solution = rng.normal(size=d)
    local = lambda x, row: 0.5 * x @ (row["a"] @ x) - row["b"] @ x
    data = {"a": a, "b": a @ solution}
    return _problem(local, data, np.zeros(d), _largest(a.mean(0)), [1.0] * n, solution)


def low_rank(n=8, side=24, rank=2, difference=1.0, sigma=0.0, seed=0) -> Problem:
    """f_i = ||X - T_i||_F^2 / 2: the mean of the T_i has low rank, each T_i has full rank."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(side, rank)) @ rng.normal(size=(rank, side))
    own = difference * rng.normal(size=(n, side, side))
    local = lambda x, row: 0.5 * jnp.sum((x - row["t"]) ** 2)
    data = {"t": mean + own - own.mean(0)}
    return _problem(local, data, np.zeros((side, side)), 1.0, [1.0] * n, mean, sigma=sigma)


def valley(n=1, slope=0.5) -> Problem:
    """f = slope |x + y| + |x - y|: a sign never moves x + y (Karimireddy et al. 2019)."""
    local = lambda x, row: slope * jnp.abs(x[0] + x[1]) + jnp.abs(x[0] - x[1]) + row["zero"]
    return _problem(local, {"zero": np.zeros(n)}, [1.0, 0.53], 1.0, [1.0] * n, np.zeros(2))


PROBLEMS = {
    f.__name__: f
    for f in (
        divergence,
        quadratics,
        least_squares,
        noisy_quadratic,
        diagonal,
        logistic,
        regression,
        rare_features,
        low_rank,
        valley,
    )
}
