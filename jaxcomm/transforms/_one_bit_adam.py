"""1-bit Adam: Adam until its variance is stable, then one bit a coordinate of momentum.

Warm-up, g the dense mean of the gradients:
    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   u = m^ / (sqrt(v^) + eps)
After it, v stays as it is, and (C the one-bit codec, e_i and s its error memories)
    m_i = b1 m + (1 - b1) g_i,   m = two_phase_mean_C(m_i; e_i, s),   u = m^ / (sqrt(v^) + eps)
m^ = m / (1 - b1^t) goes on being corrected for its bias; v^ keeps the correction of the freeze.
The safety rule of `jaxcomm.transforms._one_bit` keeps coordinates of (almost) zero variance safe.

Source: Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang & He 2021, "1-bit Adam: Communication
Efficient Large-Scale Training with Adam's Convergence Speed" (arXiv 2102.02888), Algorithm 1. The
paper has no bias correction; its automatic freeze is section 7.1's rule on the norm of v.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, dense_mean, flatten
from jaxcomm.collectives.flatten import zeros_like_float32
from jaxcomm.compressors._sign import sign
from jaxcomm.compressors.base import Compressor
from jaxcomm.transforms._one_bit import (
    OneBitExchange,
    check_one_bit,
    debias,
    make_freeze,
    precondition,
    update_limit,
    zero_server_error,
)
from jaxcomm.transforms.common import Communication, zero_count


class OneBitAdamState(NamedTuple):
    """Moments and error memories; trees are float32, like params."""

    count: jax.Array  # shape=(), dtype=jnp.int32; replicated: updates so far
    frozen_at: jax.Array  # shape=(), dtype=jnp.int32; replicated: updates before v froze, or -1
    mu: optax.Updates  # replicated: m
    nu: optax.Updates  # replicated: v
    norms: jax.Array | None  # float32, shape=(window,); replicated: ||v^||_1, automatic freeze only
    error: optax.Updates  # per worker: e_i
    server_error: jax.Array  # float32, shape=(ceil(d/n),); per worker: s


def scale_by_one_bit_adam(
    axis_name: AxisName,
    *,
    freeze_step: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    compressor: Compressor = sign("l2"),
    max_update: float | None = None,
    variance_window: int | None = None,
    warmup_steps: int = 0,
    seed: int = 0,
) -> Communication:
    """The direction of 1-bit Adam, to be scaled by a learning rate; see `one_bit_adam`."""
    check_one_bit("one_bit_adam", compressor, max_update, b1=b1, b2=b2)
    freeze = make_freeze("one_bit_adam", freeze_step, b2, variance_window, warmup_steps)
    exchange = OneBitExchange(compressor, axis_name, seed)

    def init_fn(params):
        zeros = lambda: zeros_like_float32(params)
        return OneBitAdamState(
            count=zero_count(),
            frozen_at=zero_count() - 1,
            mu=zeros(),
            nu=zeros(),
            norms=freeze.initial_norms(),
            error=zeros(),
            server_error=zero_server_error(params, axis_name),
        )

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        gradient, unflatten = flatten(updates)
        memory = lambda vector: unflatten(vector, jnp.float32)
        m, v = flatten(state.mu)[0], flatten(state.nu)[0]
        frozen, t = state.frozen_at >= 0, state.count + 1

        def warm_up():
            mean = dense_mean(gradient, axis_name)
            new_m, new_v = b1 * m + (1 - b1) * mean, b2 * v + (1 - b2) * mean**2
            due, norms = freeze.due(t, debias(new_v, b2, t), state.norms)
            memories = flatten(state.error)[0], state.server_error
            return new_m, new_v, jnp.where(due, t, -1), norms, *memories

        def one_bit():
            mean, *memories = exchange.mean(b1 * m + (1 - b1) * gradient, state, v > 0)
            return mean, v, state.frozen_at, state.norms, *memories

        m, v, frozen_at, norms, error, server_error = cond(frozen, one_bit, warm_up)
        v_hat = debias(v, b2, jnp.where(frozen, frozen_at, t))
        limit = jnp.where(frozen, update_limit(max_update, b1, b2), jnp.inf)
        direction = precondition(debias(m, b1, t), v_hat, eps, limit)
        return unflatten(direction), OneBitAdamState(
            t, frozen_at, memory(m), memory(v), norms, memory(error), server_error
        )

    return Communication(init_fn, update_fn)


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: AxisName,
    *,
    freeze_step: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask=None,
    compressor: Compressor = sign("l2"),
    max_update: float | None = None,
    variance_window: int | None = None,
    warmup_steps: int = 0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""1-bit Adam: AdamW on dense means, then on one-bit means of the momentum.

    Until the freeze it is `optax.adamw` on `average(axis_name)`. After it

    .. math:: m_i = \beta_1 m + (1-\beta_1) g_i,\quad
      m \leftarrow C(\tfrac1n\sum_i C(m_i + e_i) + s),\quad
      x \leftarrow x - \gamma\,(\hat m / (\sqrt{\hat v} + \epsilon) + \lambda x)

    with v as it was, and per step some 2 bits a coordinate sent by each worker instead of 64.
    A coordinate without any gradient in the warm-up stays where it is, and no coordinate moves
    further than Adam could have moved it: textbook 1-bit Adam, which is max_update=math.inf,
    explodes where a frozen variance is almost zero.

    The freeze is in the state: `optax.tree.get(opt_state, "frozen_at")`, -1 before it. If tensors
    have gradients of very different size, give each block its own scale:
    `compressor=sign("l2", block_size=4096)`.

    Args:
      learning_rate: a number or a schedule.
      axis_name: name of the worker axis.
      freeze_step: updates before v is frozen (the paper's runs: 15 to 25 % of the steps). None
        freezes once the 1-norm of v is at least 0.96 of what it was `variance_window` updates ago.
      b1: decay of the momentum.
      b2: decay of the variance.
      eps: added to the root of the variance.
      weight_decay: decoupled, as in AdamW; coordinates that stay put decay too.
      mask: which leaves decay, as in `optax.adamw`.
      compressor: codec of both hops.
      max_update: limit of a coordinate's step, in learning rates, once v is frozen; None is
        Adam's own bound, max(1, (1 - b1) / sqrt(1 - b2)).
      variance_window: of the automatic rule; None is 1 / (1 - b2).
      warmup_steps: the automatic rule waits for this update (the learning rate's warm-up).
      seed: seeds the keys of random codecs.

    Returns:
      An Optax optimizer, not for use under a sync rule. Its `init` must run where the axis is bound
      (make_train_step does that).

    Raises:
      ValueError: freeze_step or variance_window below 1, decays outside [0, 1), or max_update <= 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm, optax
      >>> tx = jaxcomm.one_bit_adam(1e-2, "workers", freeze_step=1)
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=4)
      >>> state = step.init(jnp.zeros(3), jax.random.key(0))
      >>> state, metrics = step(state, jnp.ones((8, 3)))
      >>> int(optax.tree.get(state.opt_state, "frozen_at"))
      1

    References:
      Tang et al. 2021, 1-bit Adam (arXiv 2102.02888).
    """
    direction = scale_by_one_bit_adam(
        axis_name,
        freeze_step=freeze_step,
        b1=b1,
        b2=b2,
        eps=eps,
        compressor=compressor,
        max_update=max_update,
        variance_window=variance_window,
        warmup_steps=warmup_steps,
        seed=seed,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
