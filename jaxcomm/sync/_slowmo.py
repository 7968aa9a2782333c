r"""Slow momentum on averaged rounds (SlowMo), and one round stale (CO2).

With p_t the mean displacement of a round, Lambda_t >= 1 a staleness gap and phi a clip:

    m <- beta m + p_t / Lambda_t,   m <- clip(m, -phi, phi),   z <- z - alpha m

SlowMo uses this round's p, CO2 the round before's, whose transfer hid behind this one. Where the
learning rate gamma is given, momentum is kept in gradient units: p_t / gamma_t goes in, gamma_t m
comes out. The clipped momentum is what is kept, so that |m| <= phi.

Sources: Wang, Tantia, Ballas & Rabbat 2020, SlowMo (arXiv 1910.00643); Sun et al. 2024, CO2
(ICLR, arXiv 2401.16265). The form of Lambda is not fixed here: the authors' code has a constant 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName
from jaxcomm.sync._overlapped import overlapped
from jaxcomm.sync._periodic import periodic
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._schedules import Schedule
from jaxcomm.transforms._average import average
from jaxcomm.transforms.common import Communication

# (x_{t,0} - x_{t-1,0}, p_t) -> Lambda_t, a scalar or a tree, at least 1
Staleness = Callable[[optax.Params, optax.Updates], jax.Array | optax.Updates]


class SlowMomentumState(NamedTuple):
    """State of the outer optimizer; float32 trees like params."""

    momentum: optax.Updates  # m
    previous: Any  # x_{t-1,0}; only with a staleness gap


def slow_momentum(
    alpha: float = 1.0,
    beta: float = 0.5,
    *,
    learning_rate: Callable | float | None = None,
    staleness: Staleness | None = None,
    clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The outer optimizer of SlowMo and CO2 (see the module).

    Args:
      alpha: slow learning rate.
      beta: slow momentum.
      learning_rate: the inner optimizer's schedule or rate gamma, read at the round's last step;
        None keeps the momentum in units of displacements.
      staleness: Lambda, a function of the anchor's last move and the displacement; None is 1.
      clip: phi; None does not clip.

    Raises:
      ValueError: beta outside [0, 1), or clip <= 0.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"slow_momentum: beta must be in [0, 1), got {beta}")
    if clip is not None and clip <= 0:
        raise ValueError(f"slow_momentum: clip must be positive, got {clip}")
    rate: Any = learning_rate if callable(learning_rate) else lambda step: learning_rate

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        previous = None if staleness is None else jax.tree.map(jnp.asarray, params)
        return SlowMomentumState(zeros, previous)

    def update_fn(updates, state, params=None, **extra):
        if staleness is not None:
            move = jax.tree.map(lambda z, old: z - old, params, state.previous)
            updates = _divide(updates, staleness(move, updates))
        gamma = inverse = 1.0
        if learning_rate is not None:
            gamma = jnp.asarray(rate(extra["local_step"] - 1), jnp.float32)
            inverse = jnp.where(gamma > 0, 1.0 / gamma, 0.0)
        momentum = jax.tree.map(lambda m, p: beta * m + inverse * p, state.momentum, updates)
        if clip is not None:
            momentum = jax.tree.map(lambda m, phi=clip: jnp.clip(m, -phi, phi), momentum)
        steps = jax.tree.map(lambda m: -alpha * gamma * m, momentum)
        return steps, SlowMomentumState(momentum, None if staleness is None else params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _divide(updates, gap):
    if jax.tree.structure(gap) != jax.tree.structure(updates):  # one scalar for all
        gap = jax.tree.map(lambda p: gap, updates)
    return jax.tree.map(lambda p, by: p / by, updates, gap)


def relative_gap(move, displacement) -> jax.Array:
    """1 + ||move|| / ||displacement||: how far the anchor went since, in sizes of a round.

    One choice of Lambda, ours.
    """
    size = optax.tree.norm(displacement)
    return 1.0 + optax.tree.norm(move) / jnp.where(size > 0, size, 1.0)


def slowmo(
    axis_name: AxisName,
    every: Schedule | int,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    learning_rate: Callable | float | None = None,
    communication: Communication | None = None,
    total_steps: int | None = None,
) -> SyncRule:
    """SlowMo: rounds of local steps, averaged, with slow momentum.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      alpha: slow learning rate; 1 with beta = 0 is local SGD.
      beta: slow momentum.
      learning_rate: the inner rate or schedule, to keep the momentum in gradient units.
      communication: what averages the displacements; default `average(axis_name)`.
      total_steps: length of the training; the last round ends there.
    """
    slow = slow_momentum(alpha, beta, learning_rate=learning_rate)
    outer = optax.chain(communication or average(axis_name), slow)
    return periodic(outer, every, total_steps=total_steps)


def co2(
    axis_name: AxisName,
    every: Schedule | int = 48,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    delay: int = 1,
    learning_rate: Callable | float | None = None,
    staleness: Staleness | None = None,
    clip: float | None = None,
    communication: Communication | None = None,
    total_steps: int | None = None,
) -> SyncRule:
    """CO2: slow momentum on the mean of the round before, so that no worker waits.

    Nothing has arrived at the end of the first round: the anchor stays where it is.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      alpha: slow learning rate.
      beta: slow momentum.
      delay: rounds that a transfer may take; 0 waits, which is SlowMo.
      learning_rate: the inner rate or schedule, to keep the momentum in gradient units.
      staleness: the penalty Lambda, for example `relative_gap`; None is 1.
      clip: bound of the momentum's entries; None does not clip.
      communication: what averages the displacements; default `average(axis_name)`.
      total_steps: length of the training; the last round ends there.

    Raises:
      ValueError: delay < 0, beta outside [0, 1), or clip <= 0.
    """
    if delay < 0:
        raise ValueError(f"co2: delay must not be negative, got {delay}")
    slow = slow_momentum(alpha, beta, learning_rate=learning_rate, staleness=staleness, clip=clip)
    send = communication or average(axis_name)
    if delay == 0:
        return periodic(optax.chain(send, slow), every, total_steps=total_steps)
    return overlapped(
        axis_name, every, slow, communication=send, rounds=delay, total_steps=total_steps
    )
