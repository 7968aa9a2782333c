r"""Deep Gradient Compression: one coordinate in a thousand, with the momentum corrected.

    u_i <- m u_i + g_i,   v_i <- v_i + u_i            (Nesterov: u <- m (u + g), v <- v + u + g)
    send the largest coordinates of v_i; there v_i <- 0, and u_i <- 0 (factor masking)
    result = (1/n) sum_i sent_i, to be applied without further momentum

Momentum is applied before the accumulation, on each worker, so that a coordinate that waits gathers
what momentum SGD would have moved it. Local gradients are clipped to clip_norm / sqrt(n). During
warm-up more is sent: 25, 6.25, 1.5625 and 0.4 percent, then `fraction`; each stage is compiled
with its own static number of values, and only the stage of the step communicates. Leaves of at
most `dense_ndim` dimensions (biases, scales) travel dense, with momentum after the mean.

Source: Lin, Han, Mao, Wang & Dally 2018, "Deep Gradient Compression" (ICLR, arXiv 1712.01887). It
selects by a threshold sampled in each tensor; here exactly, over all tensors together, in one
exchange (pass `sparsifier=` for another choice).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, flatten, size
from jaxcomm.collectives.flatten import zeros_like_float32
from jaxcomm.compressors import Compressor, top_k
from jaxcomm.transforms._average import exchange_mean
from jaxcomm.transforms.common import (
    Communication,
    check_compressor,
    check_fixed,
    combine,
    leaf_names,
    log_dense,
    mean_left_dense,
    message_key,
    partition,
    zero_count,
)

#: Fractions of the paper's warm-up: sparsities of 75, 93.75, 98.4375 and 99.6 percent.
WARMUP_FRACTIONS = (0.25, 0.0625, 0.015625, 0.004)


class DeepGradientCompressionState(NamedTuple):
    """Momenta and what has not been sent yet; float32 trees like params."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    momentum: optax.Updates  # per worker: u_i; replicated for dense leaves
    velocity: optax.Updates  # per worker: v_i; optax.MaskedNode for dense leaves


def deep_gradient_compression(
    fraction: float,
    axis_name: AxisName,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip_norm: float | None = None,
    factor_masking: bool = True,
    warmup_steps: int = 0,
    warmup_fractions: Sequence[float] = WARMUP_FRACTIONS,
    dense_ndim: int = 1,
    sparsifier: Callable[[float], Compressor] = top_k,
    seed: int = 0,
) -> Communication:
    r"""Momentum SGD's direction from gradients of which 99.9 percent are held back.

    .. math:: u_i \leftarrow m u_i + g_i,\quad v_i \leftarrow v_i + u_i,\quad
      u = \tfrac1n \sum_i \mathrm{top}(v_i)

    Follow it by an optimizer without momentum, such as `optax.sgd(learning_rate)`; decoupled weight
    decay goes between the two.

    Args:
      fraction: of the coordinates sent, e.g. 0.001; in (0, 1].
      axis_name: name of the worker axis.
      momentum: m in [0, 1).
      nesterov: Nesterov's form.
      clip_norm: scales each worker's gradient to a norm of at most clip_norm / sqrt(n); None: no.
      factor_masking: forget the momentum of what was sent.
      warmup_steps: length of the sparsity warm-up, in equal stages.
      warmup_fractions: fractions of its stages, falling; those not above `fraction` are left out.
        `[fraction ** ((e + 1) / (w + 1)) for e in range(w)]` gives the released code's schedule.
      dense_ndim: leaves of at most so many dimensions travel dense (logged at start).
      sparsifier: makes the codec for a fraction: `top_k`, `block_top_k`, ...
      seed: seeds the keys of random codecs.

    Returns:
      An Optax transform; its output is a mean, in the direction of its input. Inside
      `optax.inject_hyperparams` name everything but momentum and clip_norm in `static_args`.

    Raises:
      ValueError: fraction, momentum, clip_norm or the warm-up out of range.

    Example:
      >>> import jaxcomm, optax
      >>> tx = optax.chain(
      ...     jaxcomm.deep_gradient_compression(0.001, "workers", warmup_steps=400), optax.sgd(0.1))

    References:
      Lin et al., Deep Gradient Compression, arXiv 1712.01887.
    """
    _check(fraction, momentum, clip_norm, warmup_steps, warmup_fractions)
    ramp = [f for f in warmup_fractions if f > fraction] if warmup_steps else []
    ends = [math.ceil(warmup_steps * (i + 1) / len(ramp)) for i in range(len(ramp))]
    stages = [(end, sparsifier(f)) for end, f in zip(ends, ramp)] + [(None, sparsifier(fraction))]
    check_compressor(stages[-1][1], "deep_gradient_compression")
    compressed = lambda leaf: jnp.ndim(leaf) > dense_ndim

    def init_fn(params):
        sparse, dense = partition(params, compressed)
        reason = f"at most {dense_ndim} dimensions"
        log_dense("deep_gradient_compression", leaf_names(dense), reason)
        return DeepGradientCompressionState(
            zero_count(), zeros_like_float32(params), zeros_like_float32(sparse)
        )

    def accelerate(u, g):
        """New momentum, and the step it asks for."""
        u = momentum * (u + g) if nesterov else momentum * u + g
        return u, (u + g if nesterov else u)

    def send(v, count):
        if not v.size:
            return v, v
        return _by_stage(stages, count, v, axis_name, seed)

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        sparse, dense = partition(_clip(updates, clip_norm, axis_name), compressed)
        old, old_dense = partition(state.momentum, compressed)

        g, unflatten = flatten(sparse)
        u, step = accelerate(flatten(old)[0], g)
        v = flatten(state.velocity)[0] + step
        mean, sent = send(v, state.count)
        if factor_masking:
            u = jnp.where(sent != 0, 0.0, u)

        _, restore = flatten(dense)
        g_dense = flatten(mean_left_dense(dense, axis_name))[0]
        u_dense, step_dense = accelerate(flatten(old_dense)[0], g_dense)

        memory = combine(unflatten(u, jnp.float32), restore(u_dense, jnp.float32))
        new = DeepGradientCompressionState(
            state.count + 1, memory, unflatten(v - sent, jnp.float32)
        )
        direction = combine(unflatten(mean), restore(step_dense))
        return jax.tree.map(lambda u, g: u.astype(g.dtype), direction, updates), new

    return Communication(init_fn, update_fn)


def _by_stage(stages, count, v, axis_name, seed):
    """The mean of what is sent in the stage of this step, and this worker's part of it."""
    if len(stages) == 1:
        compressor = stages[0][1]
        key = message_key(seed, count, axis_name, compressor)
        result = exchange_mean(v, compressor, axis_name, key)
        return result.mean, result.sent
    half = len(stages) // 2
    part = lambda some: lambda v: _by_stage(some, count, v, axis_name, seed)
    return cond(count < stages[half - 1][0], part(stages[:half]), part(stages[half:]), v)


def _clip(updates, clip_norm, axis_name):
    """This worker's gradient with a norm of at most clip_norm / sqrt(n)."""
    if clip_norm is None:
        return updates
    limit = clip_norm / math.sqrt(size(axis_name))
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(updates)]
    scale = jnp.minimum(1.0, limit / jnp.maximum(jnp.sqrt(sum(squares)), 1e-30))
    return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, updates)


def _check(fraction, momentum, clip_norm, warmup_steps, warmup_fractions) -> None:
    where, number = "deep_gradient_compression", (int, float)
    check_fixed(fraction, "fraction", where)
    check_fixed(warmup_steps, "warmup_steps", where)
    if not 0 < fraction <= 1:
        raise ValueError(f"{where}: fraction must be in (0, 1], got {fraction}")
    if isinstance(momentum, number) and not 0 <= momentum < 1:
        raise ValueError(f"{where}: momentum must be in [0, 1), got {momentum}")
    if isinstance(clip_norm, number) and not clip_norm > 0:
        raise ValueError(f"{where}: clip_norm must be positive, got {clip_norm}")
    falling = list(warmup_fractions) == sorted(set(warmup_fractions), reverse=True)
    if warmup_steps < 0 or not falling or any(not 0 < f <= 1 for f in warmup_fractions):
        raise ValueError(
            f"{where}: warmup_steps must not be negative and warmup_fractions must fall, in "
            f"(0, 1], got {warmup_steps=}, {warmup_fractions=}"
        )
