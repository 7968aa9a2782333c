"""When replicas meet: the length H of a round as a pure function of the step it starts at.

    every(h)         H = h
    power_rule       H = max(h_base, floor((coefficient / lr_t)^power))
    qsr              power_rule with power 2, the Quadratic Synchronization Rule
    post_local       H = 1 until `start`, then h
    swap             the rounds of another schedule until `start`, then one round to the end

lr_t is the learning rate at the round's first step; the clock is the local step. A round never
goes past the last step of training. Source: Gu, Lyu, Arora, Zhang & Huang 2024, "A Quadratic
Synchronization Rule for Distributed Deep Learning" (ICLR, arXiv 2310.14423); post-local SGD: Lin et
al. 2018 (arXiv 1808.07217); SWAP: Gupta, Serrano & DeCoste 2020 (arXiv 2001.02312).
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors.base import whole

Schedule = Callable[[jax.Array], jax.Array]  # first step of a round, int32 -> H, int32
_LONGEST = 2**30  # steps; also what a vanishing learning rate gives
_SLACK = 1.0 + 2.0**-20  # 8 ulp: (0.3 / 0.1)^2 is 9 here, and 8.999999 in float32


def every(h: int) -> Schedule:
    """Rounds of h local steps.

    Raises:
      ValueError: h < 1, or not whole.
    """
    if not whole(h, 1):
        raise ValueError(f"every: a round needs a whole number, at least one step, got h={h}")
    return lambda step: jnp.full(jnp.shape(step), h, jnp.int32)


def power_rule(
    learning_rate: Callable | float,
    coefficient: float,
    h_base: int,
    power: int,
    warmup_steps: int = 0,
) -> Schedule:
    """H = max(h_base, floor((coefficient / lr)^power)), lr read at the round's first step.

    Args:
      learning_rate: the inner optimizer's schedule (step -> lr), or a constant.
      coefficient: alpha of QSR, beta of the linear rule; in units of the learning rate.
      h_base: shortest round, in local steps.
      power: 1 linear, 2 quadratic, 3 cubic.
      warmup_steps: before this step the rate at this step counts.

    Raises:
      ValueError: h_base < 1 or not whole, coefficient < 0, or a zero rate at the first step that
        counts.
    """
    if not whole(h_base, 1):
        raise ValueError(f"power_rule: h_base must be whole and at least 1, got {h_base}")
    if not coefficient >= 0:  # nor nan
        raise ValueError(f"power_rule: the coefficient must not be negative, got {coefficient}")
    if not warmup_steps >= 0:
        raise ValueError(f"power_rule: warmup_steps must not be negative, got {warmup_steps}")
    rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
    if not float(rate(warmup_steps)) > 0:
        raise ValueError(
            f"power_rule: the learning rate at step {warmup_steps} is {float(rate(warmup_steps))}, "
            "which would give one endless round; set warmup_steps to the end of the warm-up"
        )

    def schedule(step):
        lr = jnp.asarray(rate(jnp.maximum(step, warmup_steps)), jnp.float32)
        length = jnp.floor((coefficient / lr) ** power * _SLACK)
        # a rate of zero makes the length infinite, or 0/0 with coefficient 0
        length = jnp.nan_to_num(length, nan=h_base, posinf=_LONGEST)
        return jnp.clip(length, h_base, _LONGEST).astype(jnp.int32)

    return schedule


def qsr(
    learning_rate: Callable | float, alpha: float, h_base: int, warmup_steps: int = 0
) -> Schedule:
    """The Quadratic Synchronization Rule: H = max(h_base, floor((alpha / lr)^2)).

    Args:
      learning_rate: the inner optimizer's schedule (step -> lr), or a constant.
      alpha: growth coefficient, in units of the learning rate (ViT-B in the paper: 0.0175).
      h_base: shortest round, in local steps.
      warmup_steps: before this step the rate at this step counts.

    Raises:
      ValueError: as `power_rule`.
    """
    return power_rule(learning_rate, alpha, h_base, 2, warmup_steps)


def post_local(start: int, h: int) -> Schedule:
    """Post-local SGD: meets every step before `start`, then every h steps.

    Raises:
      ValueError: h < 1 or start < 0, or not whole.
    """
    if not (whole(h, 1) and whole(start, 0)):
        raise ValueError(f"post_local: needs whole h >= 1 and start >= 0, got {h=}, {start=}")
    return lambda step: jnp.where(step < start, 1, h).astype(jnp.int32)


def swap(start: int, before: Schedule | int = 1) -> Schedule:
    """SWAP: meets as `before` says until `start`, then once more, at the end of training.

    The last round only ends if the sync rule knows `total_steps`.

    Args:
      start: local step after which workers stay apart.
      before: schedule, or number of steps, of the rounds up to there.

    Raises:
      ValueError: start < 0 or not whole, or rounds of less than one step.
    """
    if not whole(start, 0):
        raise ValueError(f"swap: start must be whole and not negative, got {start}")
    rounds = as_schedule(before, "swap")

    def schedule(step):
        length = jnp.minimum(rounds(step), start - step)
        return jnp.where(step < start, length, _LONGEST).astype(jnp.int32)

    return schedule


def as_schedule(value: Schedule | int, where: str) -> Schedule:
    """The schedule itself, or rounds of that many steps.

    Raises:
      ValueError: a number below 1; TypeError: neither a schedule nor a whole number.
    """
    if callable(value):
        return value
    try:
        h = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{where}: every must be a schedule or a number of steps, got {value!r}"
        ) from None
    if h < 1:
        raise ValueError(f"{where}: a round needs at least one step, got every={h}")
    return every(h)


def round_end(schedule: Schedule, step: jax.Array, total_steps: int | None = None) -> jax.Array:
    """The local step, int32, at which the round that starts at `step` ends.

    With `total_steps` no round crosses it; a training that goes on beyond follows the schedule.
    """
    end = step + jnp.clip(jnp.asarray(schedule(step), jnp.int32), 1, _LONGEST)  # int32 holds it
    if total_steps is None:
        return end
    return jnp.where(step < total_steps, jnp.minimum(end, total_steps), end)


def check_total_steps(total_steps: int | None, where: str) -> None:
    """Raises a ValueError for a training of less than one step."""
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"{where}: total_steps must be at least 1, got {total_steps}")


def sync_steps(schedule: Schedule | int, n: int) -> list[int]:
    """The steps after which replicas meet, for a training of n steps; the last one is n.

    Runs on the host; entry i is the number of local steps done at meeting i.

    Raises:
      ValueError: n < 0 or not whole.

    Example:
      >>> import jaxcomm
      >>> jaxcomm.sync_steps(jaxcomm.post_local(start=3, h=4), 9)
      [1, 2, 3, 7, 9]
    """
    if not whole(n, 0):
        raise ValueError(f"sync_steps: n must be whole and not negative, got {n}")
    n, schedule = int(n), as_schedule(schedule, "sync_steps")
    ends = jax.vmap(functools.partial(round_end, schedule, total_steps=n))
    table = np.asarray(jax.jit(ends)(jnp.arange(n, dtype=jnp.int32)))
    steps, t = [], 0
    while t < n:
        t = int(table[t])
        steps.append(t)
    return steps
