r"""Just one byte: training with forward passes only, one byte a sample on the wire (SPSA, MeZO).

All workers hold the same parameters x. For sample k of step t, drawn from (seed, t, k),

    z_k ~ N(0, I),   p_k = (f_k(x + eps z_k) - f_k(x - eps z_k)) / (2 eps)

is a scalar: the derivative along z_k. It is all that travels, as q_k in one byte; everyone draws
the z_k of all others again, in the same order, so that the parameters stay equal bit for bit:

    x <- x - lr (1/K) sum_k q_k z_k

q is p on 255 levels of [-c, c], rounded up or down at random without bias; the 256th byte means
"not counted" (the loss was not finite). E p z = grad f on quadratics and E ||p z||^2 =
(d + 2) ||grad f||^2, hence stable steps are some d times smaller than SGD's. Whoever holds an old
state and the bytes sent since then can catch up without a single message (`replay`).

Source: Zelikman, Huang, Liang, Haber & Goodman 2023, "Just One Byte (per gradient): A Note on
Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness" (arXiv 2306.10015);
Malladi et al. 2023, MeZO (arXiv 2305.17333). The released code sends floats, and its update has a
further factor eps: its learning rate 0.1 at eps 1e-3 is 1e-4 here. The byte's format is ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, all_gather, index, varying
from jaxcomm.collectives.flatten import check_floating

_STEPS = 127  # levels on each side of zero
ABSENT = 255  # the byte of a sample that is not counted


class JustOneByteState(NamedTuple):
    """All replicated."""

    step: jax.Array  # shape=(), dtype=jnp.int32
    params: optax.Params


class StepLog(NamedTuple):
    """What a step leaves behind."""

    codes: jax.Array  # shape=(n, samples), dtype=jnp.uint8; replicated: all that travelled
    loss: jax.Array  # shape=(), float32; per worker: the mean of its losses


class JustOneByte(NamedTuple):
    """Pure functions; `step` runs on every worker where the axis is bound, the others anywhere.

    init:   params -> state
    step:   state, batch -> state, StepLog; axis 0 of this worker's batch leaves is cut into
            `samples` contiguous parts, one for each sample
    replay: state, codes -> state; codes of shape (steps, n, samples), as logged since that state
    """

    init: Callable
    step: Callable
    replay: Callable


def just_one_byte(
    loss_fn: Callable,
    axis_name: AxisName,
    *,
    learning_rate: optax.ScalarOrSchedule,
    clip: float,
    epsilon: float = 1e-3,
    samples: int = 1,
    seed: int = 0,
) -> JustOneByte:
    r"""A training step of forward passes, in which each sample sends one byte.

    .. math:: p_k = \frac{f_k(x + \epsilon z_k) - f_k(x - \epsilon z_k)}{2\epsilon},\quad
      x \leftarrow x - \gamma \tfrac1K \textstyle\sum_k Q(p_k) z_k

    Two forward passes a sample, no gradient, no optimizer state. With n workers K = n * samples;
    n workers of one sample are one worker of n samples, bit for bit, and workers may come and go
    between steps (the codes of a step tell how many there were).

    Args:
      loss_fn: `loss_fn(params, batch, key)` returns a scalar, or `(scalar, aux)`.
      axis_name: name of the worker axis.
      learning_rate: a number or a schedule; stable below some 2 / (d + 2) over the curvature for
        one sample.
      clip: c > 0, the largest |p| that can be sent, some 3 times the norm of the gradient.
      epsilon: size of the perturbation.
      samples: of each worker in a step.
      seed: seeds the perturbations, the same on all workers.

    Returns:
      A JustOneByte: `init`, `step`, `replay`.

    Raises:
      ValueError: clip or epsilon not positive, or samples below 1.
      TypeError: (init) a leaf is not floating-point; let loss_fn hold it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm
      >>> loss_fn = lambda x, batch, key: jnp.mean((x - batch) ** 2)
      >>> job = jaxcomm.just_one_byte(
      ...     loss_fn, "workers", learning_rate=0.1, clip=10.0, samples=8)
      >>> state = job.init(jnp.zeros(3))
      >>> step = jax.vmap(job.step, (None, 0), (None, 0), axis_name="workers")
      >>> new, log = step(state, jnp.ones((4, 8, 3)))
      >>> log.codes[0].shape, log.codes.dtype  # 4 workers of 8 bytes
      ((4, 8), dtype('uint8'))
      >>> replayed = jax.jit(job.replay)(state, log.codes[:1])
      >>> bool(jnp.all(replayed.params == new.params))
      True

    References:
      Zelikman et al. 2023, Just One Byte (arXiv 2306.10015).
    """
    for name, value in (("clip", clip), ("epsilon", epsilon)):
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"just_one_byte: {name} must be positive, got {value}")
    if samples < 1:
        raise ValueError(f"just_one_byte: samples must be at least 1, got {samples}")

    def keys(step, number):
        """Keys of sample `number` of a step: the direction's, the rounding's, the loss's."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)
        return jax.random.split(key, 3)

    def init_fn(params):
        check_floating(params)
        return JustOneByteState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params))

    def measure(state, number, part):
        """The byte of one sample of this worker, and its loss."""
        direction, rounding, noise = keys(state.step, number)
        z = _direction(direction, state.params)

        def loss(sign):
            out = loss_fn(_moved(state.params, sign * epsilon, z), part, noise)
            return jnp.asarray(out[0] if isinstance(out, tuple) else out, jnp.float32)

        up, down = loss(1.0), loss(-1.0)
        return encode_byte((up - down) / (2 * epsilon), clip, rounding), (up + down) / 2

    def apply(state, codes):
        """The step that everyone makes from everyone's bytes, in the order of the samples."""
        codes = codes.reshape(-1)
        count = jnp.maximum(jnp.sum(codes != ABSENT), 1)
        lr = learning_rate(state.step) if callable(learning_rate) else learning_rate
        weights = decode_byte(codes, clip) * -(jnp.asarray(lr) / count)

        def add(total, sample):
            number, weight = sample
            z = _direction(keys(state.step, number)[0], state.params)
            return jax.tree.map(lambda a, b: a + weight * b, total, z), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        numbers = jnp.arange(codes.size, dtype=jnp.int32)
        change, _ = jax.lax.scan(add, zeros, (numbers, weights))
        return JustOneByteState(state.step + 1, _moved(state.params, 1.0, change))

    def step_fn(state, batch):
        parts = jax.tree.map(lambda x: _split(x, samples), batch)
        numbers = index(axis_name) * samples + jnp.arange(samples, dtype=jnp.int32)
        view = varying(state, axis_name)
        codes, losses = jax.lax.map(lambda sample: measure(view, *sample), (numbers, parts))
        codes = all_gather(codes, axis_name)
        return apply(state, codes), StepLog(codes, jnp.mean(losses))

    def replay_fn(state, codes):
        return jax.lax.scan(lambda state, c: (apply(state, c), None), state, codes)[0]

    return JustOneByte(init_fn, step_fn, replay_fn)


def encode_byte(p: jax.Array, clip: float, key: jax.Array) -> jax.Array:
    """p on 255 levels of [-clip, clip], rounded without bias; uint8, ABSENT if not finite."""
    level = jnp.clip(p / clip, -1.0, 1.0) * _STEPS
    rounded = jnp.floor(level + jax.random.uniform(key, jnp.shape(p), jnp.float32)) + _STEPS
    return jnp.where(jnp.isfinite(p), jnp.clip(rounded, 0, 2 * _STEPS), ABSENT).astype(jnp.uint8)


def decode_byte(code: jax.Array, clip: float) -> jax.Array:
    """The float32 that a byte stands for; 0 for ABSENT."""
    value = (code.astype(jnp.float32) - _STEPS) * (clip / _STEPS)
    return jnp.where(code == ABSENT, 0.0, value)


def _direction(key: jax.Array, params):
    """z ~ N(0, I), float32, leaf by leaf in tree order."""
    leaves, treedef = jax.tree.flatten(params)
    draw = lambda i, x: jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32)
    return treedef.unflatten([draw(i, x) for i, x in enumerate(leaves)])


def _moved(params, distance, direction):
    """params + distance * direction, computed in float32, in the dtypes of params."""
    return jax.tree.map(
        lambda x, z: (x.astype(jnp.float32) + distance * z).astype(x.dtype), params, direction
    )


def _split(x: jax.Array, samples: int) -> jax.Array:
    if x.shape[0] % samples:
        raise ValueError(
            f"just_one_byte: samples={samples} must divide the rows of every batch leaf, got "
            f"{x.shape[0]} rows on a worker"
        )
    return x.reshape(samples, x.shape[0] // samples, *x.shape[1:])
