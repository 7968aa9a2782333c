r"""0/1 Adam: local steps of Adam, a variance learned at ever fewer steps, one bit when they meet.

At step t worker i has its own momentum and parameters, and u_i, what it has moved since the last
meeting; v is shared, z are the parameters of the last meeting.

    t in T_v:  v <- b2 v + (1 - b2) (mean_i g_i)^2                    a dense mean
    m_i <- b1 m_i + (1 - b1) g_i,  u_i <- u_i + c_t m_i,  x_i <- x_i - c_t m_i / (sqrt(v^) + eps)
    t in T_u:  u = two_phase_mean_C(u_i; e_i, s)                      one bit a coordinate
               m_i <- u / sum c,  z <- z - u / (sqrt(v^) + eps),  x_i <- z,  u_i <- 0

with c_t = lr_t / (1 - b1^t), which is Adam's bias correction of the momentum; v^ is v corrected for
the number of its updates. As in Adam (and the released code) v is updated before it is used.
Weight decay is AdamW's, towards zero from z, so that it needs no bytes. The safety rule of
`jaxcomm.transforms._one_bit` applies to every step.

Source: Lu, Li, Zhang, De Sa & He 2022, "Maximizing Communication Efficiency for Large-scale
Training via 0/1 Adam" (arXiv 2202.06009), Algorithm 1.
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
    decaying,
    precondition,
    update_limit,
    zero_server_error,
)
from jaxcomm.transforms._zero_one_intervals import Intervals, as_intervals, variance_intervals
from jaxcomm.transforms.common import zero_count


class ZeroOneAdamState(NamedTuple):
    """Moments, what was moved, error memories; trees are float32, like params."""

    count: jax.Array  # shape=(), dtype=jnp.int32; replicated: steps so far
    mu: optax.Updates  # per worker: m_i
    nu: optax.Updates  # replicated: v
    nu_count: jax.Array  # shape=(), dtype=jnp.int32; replicated: updates of v
    moved: optax.Updates  # per worker: u_i
    anchor: optax.Params  # replicated: z
    rates: jax.Array  # shape=(), float32; replicated: sum of c_t since the last meeting
    decay: jax.Array  # shape=(), float32; replicated: sum of lr_t * weight_decay since then
    next_sync: jax.Array  # shape=(), dtype=jnp.int32; replicated: steps done at the next meeting
    next_variance: jax.Array  # shape=(), dtype=jnp.int32; replicated: steps before the next T_v
    error: optax.Updates  # per worker: e_i
    server_error: jax.Array  # float32, shape=(ceil(d/n),); per worker: s


def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: AxisName,
    *,
    sync_every: Intervals | int = 1,
    variance_every: Intervals | int | None = None,
    variance_stop: int = 100_000,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask=None,
    compressor: Compressor = sign("l2"),
    max_update: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """0/1 Adam: one bit a coordinate at meetings only, dense means at ever fewer steps.

    Between meetings the workers' parameters differ: make_train_step keeps a copy for each, and
    `step.consensus` is their mean. A meeting waits while all rates since the last one are zero:
    nothing has moved, and what the error memories release could not be applied. Updates are
    float32 whatever the parameters are; after a meeting x_i + (z - x_i) is z up to the rounding of
    that sum, which is not carried on.

    Args:
      learning_rate: a number or a schedule.
      axis_name: name of the worker axis.
      sync_every: T_u, as the length of the round that starts at a step, or a number:
        `local_step_intervals(start=variance_stop)` is the paper's, 1 meets at every step.
      variance_every: T_v likewise; None is the paper's `variance_intervals(16)`.
      variance_stop: v is not updated from this step on (end of the learning rate's warm-up).
      b1: decay of the momentum.
      b2: decay of the variance.
      eps: added to the root of the variance.
      weight_decay: decoupled, as in AdamW.
      mask: which leaves decay, as in `optax.adamw`.
      compressor: codec of both hops.
      max_update: limit of a coordinate's step, in learning rates; None is Adam's own bound,
        max(1, (1 - b1) / sqrt(1 - b2)).
      seed: seeds the keys of random codecs.

    Returns:
      An Optax optimizer, not for use under a sync rule. Its `init` must run where the axis is bound
      (make_train_step does that).

    Raises:
      ValueError: intervals or variance_stop below 1, decays outside [0, 1), or max_update <= 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm
      >>> tx = jaxcomm.zero_one_adam(
      ...     1e-3, "workers", variance_stop=100,
      ...     sync_every=jaxcomm.local_step_intervals(start=100, scaler=200))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=4)
      >>> state = step.init(jnp.zeros(3), jax.random.key(0))
      >>> state.params.shape  # one copy for each worker
      (4, 3)

    References:
      Lu et al. 2022, 0/1 Adam (arXiv 2202.06009).
    """
    where = "zero_one_adam"
    check_one_bit(where, compressor, max_update, b1=b1, b2=b2)
    rounds = as_intervals(where, "sync_every", sync_every)
    if variance_every is None:
        variance_every = variance_intervals()
    waits = as_intervals(where, "variance_every", variance_every)
    if isinstance(variance_stop, int) and variance_stop < 1:
        raise ValueError(f"{where}: variance_stop must be at least 1, got {variance_stop}")
    exchange = OneBitExchange(compressor, axis_name, seed)

    def init_fn(params):
        zeros, zero = lambda: zeros_like_float32(params), zero_count()
        return ZeroOneAdamState(
            count=zero,
            mu=zeros(),
            nu=zeros(),
            nu_count=zero,
            moved=zeros(),
            anchor=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params),
            rates=jnp.zeros((), jnp.float32),
            decay=jnp.zeros((), jnp.float32),
            next_sync=rounds(zero),
            next_variance=zero,
            error=zeros(),
            server_error=zero_server_error(params, axis_name),
        )

    def variance(state, gradient):
        """(v, number of its updates, next step of T_v) after this step."""
        v, step = flatten(state.nu)[0], state.count

        def learn():
            mean = dense_mean(gradient, axis_name)
            return b2 * v + (1 - b2) * mean**2, state.nu_count + 1, step + waits(step)

        keep = lambda: (v, state.nu_count, state.next_variance)
        due = (step >= state.next_variance) & (step < variance_stop)
        return cond(due, learn, keep)

    def update_fn(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("zero_one_adam: update needs the parameters, got params=None")
        gradient, unflatten = flatten(updates)
        memory = lambda vector: unflatten(vector, jnp.float32)
        v, nu_count, next_variance = variance(state, gradient)
        v_hat, limit, t = debias(v, b2, nu_count), update_limit(max_update, b1, b2), state.count + 1
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate, decay = debias(lr, b1, t), state.decay + lr * weight_decay
        z, shrinking = flatten(state.anchor)[0], decaying(state.anchor, mask)
        m = b1 * flatten(state.mu)[0] + (1 - b1) * gradient
        moved, rates = flatten(state.moved)[0] + rate * m, state.rates + rate

        def local():
            change = -rate * precondition(m, v_hat, eps, limit) - lr * weight_decay * shrinking
            own = (m, moved, flatten(state.error)[0], state.server_error)
            return change, own, (z, rates, decay, state.next_sync)

        def meet():
            total, *memories = exchange.mean(moved, state, v > 0)
            mean = total / rates
            new_z = z - rates * precondition(mean, v_hat, eps, limit) - decay * shrinking
            change = _difference(unflatten(new_z, jnp.float32), params)
            zero = jnp.zeros((), jnp.float32)
            own = (mean, jnp.zeros_like(moved), *memories)
            return change, own, (new_z, zero, zero, t + rounds(t))

        due = (t >= state.next_sync) & (rates > 0)
        change, (m, moved, error, server_error), shared = cond(due, meet, local)
        z, rates, decay, next_sync = shared
        return memory(change), ZeroOneAdamState(
            count=t,
            mu=memory(m),
            nu=memory(v),
            nu_count=nu_count,
            moved=memory(moved),
            anchor=memory(z),
            rates=rates,
            decay=decay,
            next_sync=next_sync,
            next_variance=next_variance,
            error=memory(error),
            server_error=server_error,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _difference(target, params) -> jax.Array:
    """What takes the parameters to the target as their dtype holds it, a float32 vector."""
    held = jax.tree.map(lambda z, x: z.astype(x.dtype), target, params)
    return flatten(held)[0] - flatten(params)[0]
