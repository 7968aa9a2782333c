r"""Proximal steps: for objectives f + r with a simple but perhaps non-smooth r.

    x <- prox_{gamma r}(x + u),   prox_{gamma r}(z) = argmin_y  r(y) + ||y - z||^2 / (2 gamma)

u is what the chain before has made of the gradient, -gamma g. After `ef21` this is EF21-Prox
(Fatkhullin et al. 2021, arXiv 2110.03294).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def proximal_step(prox: Callable) -> optax.GradientTransformationExtraArgs:
    """Makes the chain's step end in a proximal operator; the last link of a chain.

    Args:
      prox: maps the parameters after the step to the new ones, e.g. `soft_threshold(gamma * lam)`
        or one of `optax.projections`.

    Returns:
      An Optax transform without state; its `update` needs params.

    Example:
      >>> import jax.numpy as jnp, jaxcomm, optax
      >>> tx = optax.chain(optax.sgd(0.5), jaxcomm.proximal_step(jaxcomm.soft_threshold(0.25)))
      >>> x = jnp.array([1.0, 0.1])
      >>> updates, _ = tx.update(jnp.array([0.5, 0.0]), tx.init(x), x)
      >>> optax.apply_updates(x, updates).tolist()
      [0.5, 0.0]

    References:
      Fatkhullin et al., EF21 with Bells & Whistles, arXiv 2110.03294 (EF21-Prox).
    """

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("proximal_step: update needs params, got None")
        new = prox(optax.apply_updates(params, updates))
        return jax.tree.map(lambda a, b: a - b, new, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def soft_threshold(threshold: float) -> Callable:
    """The proximal operator of threshold * ||x||_1, on every leaf: exact zeros stay zero.

    Args:
      threshold: gamma * lambda, >= 0.
    """

    def prox(params):
        return jax.tree.map(
            lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0).astype(x.dtype), params
        )

    return prox
