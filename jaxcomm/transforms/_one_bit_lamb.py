r"""1-bit LAMB: LAMB until its variance is stable, then one-bit momentum and learned trust ratios.

Per tensor, with parameters x, m^ and v^ the moments corrected for their bias:

    warm-up      u = m^ / (sqrt(v^) + eps) + wd x,    c = clip(||x|| / ||u||, min, max)
                 c_bar <- beta c_bar + (1 - beta) c   (where c is not 1)
    at the end   s = mean over tensors of rms(m) / rms(m): all tensors to one scale
    after it     m_i = b1 m + (1 - b1) g_i,  m_new = two_phase_mean_C(s m_i; e_i, s) / s,  v frozen
                 g~ = (m_new - b1 m) / (1 - b1),  w <- b2 w + (1 - b2) g~^2,  w = v at the freeze
                 factor = max (sqrt(v^) + eps) / (sqrt(w^) + eps), tamed,  c = c_bar factor
    update       -lr c u

Trust ratios cannot be computed from quantised momentum, so they are the warm-up's average, scaled
by how the variance of the exchanged gradients has changed. With weight decay only the share of u
that is Adam's counts: factor <- r factor + (1 - r), r = min(1, ||u - wd x|| / ||u||). Tamed means
clipped to [0.5, 4], then to 10 % around the step before. c_bar starts at its first value (the
released code starts at zero), and a tensor that never had a ratio keeps 1. The safety rule of
`jaxcomm.transforms._one_bit` applies; coordinates of zero variance have no say in the factor.

Source: Li, Awan, Tang, Rajbhandari & He 2021, "1-bit LAMB: Communication Efficient Large-Scale
Large-Batch Training with LAMB's Convergence Speed" (arXiv 2104.06069), Algorithm 1.
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
    make_freeze,
    precondition,
    update_limit,
    zero_server_error,
)
from jaxcomm.transforms._trust_ratio import (
    Tensors,
    TrustRatio,
    one_scale,
    ratio_of,
    running_mean,
    tame,
)
from jaxcomm.transforms.common import zero_count


class OneBitLambState(NamedTuple):
    """Moments, ratios and error memories; trees are float32, like params."""

    count: jax.Array  # shape=(), dtype=jnp.int32; replicated: updates so far
    frozen_at: jax.Array  # shape=(), dtype=jnp.int32; replicated: updates before v froze, or -1
    mu: optax.Updates  # replicated: m
    nu: optax.Updates  # replicated: v
    fresh: optax.Updates  # replicated: w
    ratios: jax.Array  # float32, shape=(leaves,); replicated: c_bar, 0 where there is none yet
    factors: jax.Array  # float32, shape=(leaves,); replicated: the last factors
    scales: jax.Array  # float32, shape=(leaves,); replicated: s, 1 before the freeze
    norms: jax.Array | None  # float32, shape=(window,); replicated: ||v^||_1, automatic freeze only
    error: optax.Updates  # per worker: e_i, in units of s m
    server_error: jax.Array  # float32, shape=(ceil(d/n),); per worker


def one_bit_lamb(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: AxisName,
    *,
    freeze_step: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask=None,
    trust: TrustRatio = TrustRatio(),
    compressor: Compressor = sign("l2"),
    max_update: float | None = None,
    variance_window: int | None = None,
    warmup_steps: int = 0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""1-bit LAMB: LAMB on dense means, then on one-bit means of the scaled momentum.

    .. math:: x \leftarrow x - \gamma\,c\,(\hat m / (\sqrt{\hat v} + \epsilon) + \lambda x)

    with the trust ratio c per tensor: of the norms in the warm-up, learned from it afterwards.
    Until the freeze, and with TrustRatio(0, inf), it is `optax.lamb` on `average(axis_name)`.

    Args:
      learning_rate: a number or a schedule.
      axis_name: name of the worker axis.
      freeze_step: updates before v is frozen (the paper's runs: 15 to 25 % of the steps); None:
        automatic, see `one_bit_adam`.
      b1: decay of the momentum.
      b2: decay of the variance.
      eps: added to the root of the variance.
      weight_decay: decoupled, inside the trust ratio as in LAMB.
      mask: which leaves decay, as in `optax.lamb`.
      trust: limits of the trust ratio.
      compressor: codec of both hops.
      max_update: limit of a coordinate's part of m^ / sqrt(v^) once v is frozen; None is Adam's
        own bound, max(1, (1 - b1) / sqrt(1 - b2)).
      variance_window: of the automatic freeze; None is 1 / (1 - b2).
      warmup_steps: the automatic freeze waits for this update.
      seed: seeds the keys of random codecs.

    Returns:
      An Optax optimizer, not for use under a sync rule. Its `init` must run where the axis is bound
      (make_train_step does that).

    Raises:
      ValueError: freeze_step or variance_window below 1, decays outside [0, 1), max_update <= 0, or
        limits of the trust ratio that are out of order.

    Example:
      >>> import jaxcomm
      >>> tx = jaxcomm.one_bit_lamb(
      ...     1e-3, "workers", freeze_step=1000, weight_decay=0.01,
      ...     trust=jaxcomm.TrustRatio(largest=0.3))

    References:
      Li et al. 2021, 1-bit LAMB (arXiv 2104.06069).
    """
    check_one_bit("one_bit_lamb", compressor, max_update, b1=b1, b2=b2, decay=trust.decay)
    freeze = make_freeze("one_bit_lamb", freeze_step, b2, variance_window, warmup_steps)
    trust.check("one_bit_lamb")
    exchange = OneBitExchange(compressor, axis_name, seed)

    def init_fn(params):
        zeros, leaves = lambda: zeros_like_float32(params), len(jax.tree.leaves(params))
        return OneBitLambState(
            count=zero_count(),
            frozen_at=zero_count() - 1,
            mu=zeros(),
            nu=zeros(),
            fresh=zeros(),
            ratios=jnp.zeros((leaves,), jnp.float32),
            factors=jnp.ones((leaves,), jnp.float32),
            scales=jnp.ones((leaves,), jnp.float32),
            norms=freeze.initial_norms(),
            error=zeros(),
            server_error=zero_server_error(params, axis_name),
        )

    def moments(state, gradient, tensors):
        """The moments after this step, as a state; the two branches of the freeze."""
        m, v, w = (flatten(x)[0] for x in (state.mu, state.nu, state.fresh))
        t, memory = state.count + 1, tensors.memory

        def warm_up():
            mean = dense_mean(gradient, axis_name)
            new_m, new_v = b1 * m + (1 - b1) * mean, b2 * v + (1 - b2) * mean**2
            due, norms = freeze.due(t, debias(new_v, b2, t), state.norms)
            scales = jnp.where(due, one_scale(tensors.rms(new_m)), 1.0)
            memories = flatten(state.error)[0], state.server_error
            return new_m, new_v, new_v, scales, jnp.where(due, t, -1), norms, *memories

        def one_bit():
            scale = tensors.spread(state.scales)
            own = scale * (b1 * m + (1 - b1) * gradient)
            mean, *memories = exchange.mean(own, state, v > 0)
            new_m = mean / scale
            new_w = b2 * w + (1 - b2) * ((new_m - b1 * m) / (1 - b1)) ** 2
            kept = (state.scales, state.frozen_at, state.norms)
            return new_m, v, new_w, *kept, *memories

        m, v, w, scales, frozen_at, norms, error, server_error = cond(
            state.frozen_at >= 0, one_bit, warm_up
        )
        return state._replace(
            count=t,
            frozen_at=frozen_at,
            mu=memory(m),
            nu=memory(v),
            fresh=memory(w),
            scales=scales,
            norms=norms,
            error=memory(error),
            server_error=server_error,
        ), (m, v, w)

    def update_fn(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("one_bit_lamb: update needs the parameters, got params=None")
        gradient, unflatten = flatten(updates)
        tensors = Tensors(unflatten, [x.size for x in jax.tree.leaves(updates)])
        frozen = state.frozen_at >= 0
        new, (m, v, w) = moments(state, gradient, tensors)
        v_hat = debias(v, b2, jnp.where(frozen, state.frozen_at, new.count))
        limit = jnp.where(frozen, update_limit(max_update, b1, b2), jnp.inf)
        adam = precondition(debias(m, b1, new.count), v_hat, eps, limit)
        u = adam + weight_decay * decaying(params, mask)

        size = tensors.norm(u)
        ratio = ratio_of(tensors.norm(flatten(params)[0]), size)
        c = jnp.where(ratio == 1, 1.0, jnp.clip(ratio, trust.smallest, trust.largest))
        ratios = running_mean(state.ratios, c, trust.decay)
        change = (jnp.sqrt(v_hat) + eps) / (jnp.sqrt(debias(w, b2, new.count)) + eps)
        share = ratio_of(tensors.norm(adam), size)
        factor = tame(tensors.max(change, v > 0), share, state.factors, trust)
        learned = jnp.where(state.ratios > 0, state.ratios, 1.0) * factor
        new = new._replace(
            ratios=jnp.where(frozen, state.ratios, ratios),
            factors=jnp.where(frozen, factor, state.factors),
        )
        return unflatten(tensors.spread(jnp.where(frozen, learned, c)) * u), new

    lamb = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.chain(lamb, optax.scale_by_learning_rate(learning_rate))
