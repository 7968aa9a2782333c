"""Convex problems of the papers, and n workers on one in one compiled scan (a helper of tests)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

AXIS = "workers"


def run(tx, gradient, data, x0, steps, *, observe=None, seed=0):
    """Scans `steps` rounds of the workers under vmap.

    Args:
      tx: Optax chain with a collective over AXIS.
      gradient: `gradient(x, data_i, key) -> g_i`.
      data: tree of arrays with leading axis n.
      x0: where all start.
      steps: rounds.
      observe: `observe(x, state, g)` before each round's step; default x. None gives nothing.

    Returns:
      final (x, state), and the observations, every leaf with leading axis n (then steps).
    """
    observe = observe or (lambda x, state, g: x)

    def worker(data):
        def one_round(carry, t):
            x, state = carry
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), index())
            g = gradient(x, data, key)
            seen = observe(x, state, g)
            updates, state = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), state), seen

        x = jnp.asarray(x0, jnp.float32)
        return jax.lax.scan(one_round, (x, tx.init(x)), jnp.arange(steps))

    return jax.jit(jax.vmap(worker, axis_name=AXIS))(data)


def index():
    return jax.lax.axis_index(AXIS)


def least_squares(zeta, seed, n=5, d=50):
    """P3: f_i = ((i+1)^2/n) ||x||^2 / 2 - <A_i b_i, x>, with A_i b_i of size zeta/(i+1)."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, n + 1) / np.sqrt(n)
    b = rng.normal(size=(n, d)) * (zeta / np.arange(1, n + 1))[:, None]
    solution = (scale[:, None] * b).sum(0) / (scale**2).sum()
    data = {"a": scale.astype(np.float32), "b": b.astype(np.float32)}
    return data, solution


def least_squares_gradient(sigma=0.0):
    def gradient(x, data, key):
        exact = data["a"] * (data["a"] * x - data["b"])
        return exact + sigma * jax.random.normal(key, x.shape) if sigma else exact

    return gradient


def top_k_numpy(v, k):
    """The k largest magnitudes of a vector; ties to the lowest position."""
    out = np.zeros_like(v)
    where = np.argsort(-np.abs(v), kind="stable")[:k]
    out[where] = v[where]
    return out
