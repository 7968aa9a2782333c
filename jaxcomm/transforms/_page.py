r"""PAGE: a gradient estimator of low variance that rarely needs the full gradient.

    v <- grad f_i(x)                                     with probability p, and at the start
    v <- v + grad_B f_i(x) - grad_B f_i(x_previous)      otherwise, on the same minibatch B

It needs gradients at two points, so `update` takes them as functions, as Optax's line searches
take `value_fn`. Before `ef21` this is EF21-PAGE.

Source: Li, Bao, Zhang & Richtarik 2021, "PAGE" (ICML, arXiv 2008.10898); Fatkhullin et al. 2021
(arXiv 2110.03294).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import cond
from jaxcomm.collectives.flatten import zeros_like_float32
from jaxcomm.transforms.common import zero_count


class PageState(NamedTuple):
    """The estimate, and where it was made."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    estimate: optax.Updates  # float32, like params; per worker: v
    previous: optax.Params  # like params: the point of the last estimate


def page(probability: float, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""The PAGE estimator, in front of a chain such as `chain(page(0.1), ef21(...), sgd(lr))`.

    .. math:: v \leftarrow v + \nabla_B f_i(x) - \nabla_B f_i(x_{previous})

    or the full gradient, with the given probability. All workers toss the same coin.

    Args:
      probability: p in (0, 1] of a full gradient.
      seed: seeds the coin.

    Returns:
      An Optax transform. Its `update(updates, state, params, *, gradient_fn, full_gradient_fn)`
      takes the minibatch gradient at params, and functions of the parameters that give the
      gradient on the same minibatch and on all of this worker's data.

    Raises:
      ValueError: probability outside (0, 1].
      TypeError: from `update`, if one of the functions is missing.

    References:
      Li, Bao, Zhang & Richtarik, PAGE, arXiv 2008.10898.
    """
    if isinstance(probability, (int, float)) and not 0 < probability <= 1:
        raise ValueError(f"page: probability must be in (0, 1], got {probability}")

    def init_fn(params):
        return PageState(zero_count(), zeros_like_float32(params), params)

    def update_fn(updates, state, params=None, *, gradient_fn=None, full_gradient_fn=None, **extra):
        del extra
        if params is None or gradient_fn is None or full_gradient_fn is None:
            raise TypeError("page: update needs params, gradient_fn=, and full_gradient_fn=")
        float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

        def correct():
            old = gradient_fn(state.previous)
            change = lambda v, new, old: v + (new - old)
            return jax.tree.map(change, state.estimate, float32(updates), float32(old))

        key = jax.random.fold_in(jax.random.key(seed), state.count)
        full = (state.count == 0) | jax.random.bernoulli(key, probability)
        estimate = cond(full, lambda: float32(full_gradient_fn(params)), correct)
        out = jax.tree.map(lambda v, g: v.astype(g.dtype), estimate, updates)
        return out, PageState(state.count + 1, estimate, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
