"""The papers' convex and small non-convex problems: n local functions with known constants.

Every problem is f(x) = (1/n) sum_i f_i(x); worker i has row i of every leaf of `data`. Noise of
size sigma is added to a gradient by adding sigma <z, x> to the loss, z normal from the step's key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """n local functions."""

    loss: Callable[
        [jax.Array, Any, jax.Array], jax.Array
    ]  # (x, row of data, key) -> f_i(x) + noise
    data: Any  # leaves with leading axis n
    start: np.ndarray  # shape=(d,)
    smoothness: float  # L of f
    worker_smoothness: tuple[float, ...]  # the L_i
    solution: np.ndarray | None  # x*, where it is known
    exact: Callable[[jax.Array], jax.Array]  # f(x), no noise


def _problem(
    local, data, start, smoothness, worker_smoothness, solution=None, sigma=0.0
) -> Problem:
    def loss(x, row, key):
        noise = sigma * jax.random.normal(key, x.shape) @ x if sigma else 0.0
        return local(x, row) + noise

    exact = lambda x: jnp.mean(jax.vmap(lambda row: local(x, row))(data))
    data = jax.tree.map(lambda a: np.asarray(a, np.float32), data)
    constants = tuple(float(s) for s in worker_smoothness)
    start = np.asarray(start, np.float32)
    return Problem(loss, data, start, float(smoothness), constants, solution, exact)


def divergence() -> Problem:
    """P1: naive Top-1 without feedback diverges (Beznosikov et al. 2020, arXiv 2002.12410)."""
    a = np.array([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], float)
    hessians = [2 * np.outer(v, v) + 0.5 * np.eye(3) for v in a]
    local = lambda x, v: (v @ x) ** 2 + 0.25 * x @ x
    top = lambda h: np.linalg.eigvalsh(h)[-1]
    constants = [top(h) for h in hessians]
    return _problem(local, a, np.ones(3), top(sum(hessians) / 3), constants, np.zeros(3))


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
    top = np.linalg.eigvalsh(mean)[-1]
    return _problem(local, {"a": hessians, "b": b}, np.zeros(d), top, levels, solution)


def least_squares(n=5, d=50, zeta=50.0, sigma=0.0, seed=0) -> Problem:
    """P3: heterogeneous least squares f_i = ||A_i x - b_i||^2 / 2, A_i^2 = ((i+1)^2 / n) I."""
    rng = np.random.default_rng(seed)
    i = np.arange(1, n + 1)
    scale = i / np.sqrt(n)
    b = rng.normal(size=(n, d)) * (zeta / i)[:, None]
    solution = (scale[:, None] * b).sum(0) / (scale**2).sum()
    local = lambda x, row: 0.5 * jnp.sum((row["a"] * x - row["b"]) ** 2)
    constants = scale**2
    data = {"a": scale, "b": b}
    return _problem(local, data, np.zeros(d), constants.mean(), constants, solution, sigma)


def noisy_quadratic(n=1, sigma=1.0) -> Problem:
    """P4: f = ||x||^2 / 2 in R^2 with three-point noise, on which EF21-SGD with Top-1 stalls."""
    points = np.sqrt(3 * sigma**2 / 10) * np.array([[2, 0], [0, 1], [-2, -1]], np.float32)

    def local(x, row):
        return 0.5 * x @ x + 0.0 * row

    problem = _problem(local, np.zeros(n), [1.0, 1.0], 1.0, [1.0] * n, np.zeros(2))

    def loss(x, row, key):
        return local(x, row) + jnp.asarray(points)[jax.random.randint(key, (), 0, 3)] @ x

    return problem._replace(loss=loss)


def logistic(
    n=20, d=50, examples=100, penalty=0.1, spread=1.0, convex=False, sigma=0.0, seed=0
) -> Problem:
    """P2: logistic regression, worker i's features scaled by exp(spread * normal).

    The penalty is non-convex, sum x_j^2 / (1 + x_j^2), or with `convex` ||x||^2 / 2.
    """
    rng = np.random.default_rng(seed)
    scale = np.exp(spread * rng.normal(size=n))
    a = rng.normal(size=(n, examples, d)) * scale[:, None, None] / np.sqrt(d)
    truth = rng.normal(size=(n, d)) * 0.5 + rng.normal(size=d)
    b = np.sign(np.einsum("nmd,nd->nm", a, truth) + 0.1 * rng.normal(size=(n, examples)))
    bend = 1.0 if convex else 2.0

    def local(x, row):
        fit = jnp.mean(jax.nn.softplus(-row["b"] * (row["a"] @ x)))
        return fit + penalty * (0.5 * x @ x if convex else jnp.sum(x**2 / (1 + x**2)))

    bound = lambda m: np.linalg.eigvalsh(m.T @ m / len(m))[-1] / 4 + bend * penalty
    constants = [bound(m) for m in a]
    data = {"a": a, "b": b}
    smoothness = bound(a.reshape(-1, d))
    return _problem(local, data, np.zeros(d), smoothness, constants, None, sigma)


PROBLEMS = {
    f.__name__: f for f in (divergence, quadratics, least_squares, noisy_quadratic, logistic)
}
