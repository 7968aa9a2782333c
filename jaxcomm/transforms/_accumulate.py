"""Gradient accumulation that moves no bytes on the micro-steps.

    a_i <- a_i + g_i / k;  every k-th call: u = tx(a_i), a_i <- 0;  otherwise u = 0

The sum is local and float32; the wrapped transform, with its exchange, runs inside a conditional
once in k calls. `optax.MultiSteps` cannot hold a transform that communicates: its branches would
have to agree in how their results vary between workers, and its bytes could not be counted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, varying
from jaxcomm.collectives.flatten import zeros_like_float32
from jaxcomm.compressors.base import whole
from jaxcomm.transforms.common import check_fixed


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    micro_step: jax.Array  # shape=(), dtype=jnp.int32; replicated: calls since the last update
    total: optax.Updates  # float32, like params; per worker: a_i
    inner: Any  # of the wrapped transform


def accumulate(
    tx: optax.GradientTransformation, every: int, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` once in `every` calls, on the mean of the gradients in between.

    Args:
      tx: any Optax chain, its collectives included.
      every: number of micro-steps, at least 1.
      axis_name: name of the worker axis.

    Returns:
      An Optax transform whose updates are zero, and which sends nothing, on the other calls.
      Inside `optax.inject_hyperparams` name every in `static_args`. Not for use under a sync rule,
      where workers count by themselves: take `optax.MultiSteps` around what does not communicate.

    Raises:
      ValueError: every < 1, not whole, or an array.

    Example:
      >>> import jaxcomm, optax
      >>> chain = optax.chain(jaxcomm.average("workers"), optax.sgd(0.1))
      >>> tx = jaxcomm.accumulate(chain, 4, axis_name="workers")
    """
    check_fixed(every, "every", "accumulate")
    if not whole(every, 1):
        raise ValueError(f"accumulate: every must be whole and at least 1, got {every}")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return AccumulateState(
            jnp.zeros((), jnp.int32), zeros_like_float32(params), tx.init(params)
        )

    def update_fn(updates, state, params=None, **extra):
        total = jax.tree.map(lambda a, g: a + g.astype(jnp.float32) / every, state.total, updates)
        total = varying(total, axis_name)

        def exchange(total, inner):
            mean = jax.tree.map(lambda a, g: a.astype(g.dtype), total, updates)
            result, inner = tx.update(mean, inner, params, **extra)
            return result, AccumulateState(
                jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, total), inner
            )

        # whose dtypes need not be those of the gradients
        like = jax.eval_shape(exchange, total, state.inner)[0]

        def wait(total, inner):
            zeros = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), like)
            return zeros, AccumulateState(state.micro_step + 1, total, inner)

        return cond(state.micro_step == every - 1, exchange, wait, total, state.inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
