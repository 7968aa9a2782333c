"""n workers under a sync rule in one compiled scan, and a quadratic to train on (for tests)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

AXIS = "workers"


def run(rule, tx, loss_fn, data, x0, steps, *, observe=None, seed=0):
    """Scans `steps` local steps of the workers under vmap, as the train step makes them.

    Args:
      rule: the SyncRule.
      tx: inner Optax optimizer.
      loss_fn: `loss_fn(params, data_i, key)`.
      data: tree of arrays with leading axis n.
      x0: where all start.
      steps: local steps.
      observe: `observe(params, sync_state, opt_state)` after each step; default params.
      seed: of the keys, one for each worker and step.

    Returns:
      final (params, opt_state, sync_state), and the observations; leaves have leading axis n.
    """
    observe = observe or (lambda params, sync_state, opt_state: params)
    tx = optax.with_extra_args_support(tx)

    def worker(data):
        def one(carry, t):
            params, opt_state, state = carry
            key = jax.random.fold_in(jax.random.key(seed), t)
            key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
            obj_fn = lambda p: loss_fn(p, data, key)
            grads = jax.grad(obj_fn)(params)
            if rule.adjust is not None:
                grads, state = rule.adjust(grads, params, state, t, obj_fn)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            before = state
            params, state = rule.apply(params, state, t + 1)
            if rule.moments is not None:
                opt_state = rule.moments(opt_state, lambda: tx.init(params), before, t + 1)
            return (params, opt_state, state), observe(params, state, opt_state)

        params = jax.tree.map(jnp.asarray, x0)
        carry = (params, tx.init(params), rule.init(params))
        return jax.lax.scan(one, carry, jnp.arange(steps))

    return jax.jit(jax.vmap(worker, axis_name=AXIS))(data)


class Quadratic:
    """f_i(x) = 1/2 (x - b_i)' A (x - b_i) with A diagonal, in NumPy and in JAX."""

    def __init__(self, n=4, d=5, seed=0, spread=1.0, curvature=None):
        rng = np.random.default_rng(seed)
        self.a = np.linspace(0.2, 1.0, d) if curvature is None else np.asarray(curvature)
        self.b = (spread * rng.normal(size=(n, d))).astype(np.float32).astype(np.float64)
        self.x0 = rng.normal(size=d).astype(np.float32)
        self.data = jnp.asarray(self.b, jnp.float32)
        self.n = n

    def loss(self, x, b, key):
        del key
        return 0.5 * jnp.sum(jnp.asarray(self.a, jnp.float32) * (x - b) ** 2)

    def gradients(self, x):
        """All workers' gradients at their own x, (n, d)."""
        return self.a * (x - self.b)


def collectives_outside_conditionals(jaxpr):
    """Names of collective primitives that a jaxpr runs whatever a predicate says."""
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "cond":
            continue
        if name.startswith(("psum", "all_gather", "all_to_all", "ppermute", "pmax")):
            found.append(name)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += collectives_outside_conditionals(inner)
    return found
