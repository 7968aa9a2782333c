r"""Meetings whose result is used r rounds later: the transfer has whole rounds to hide in.

At the end of round t, with this worker's displacement D_i^t = z_i - x_i and the mean over workers
D^t, which leaves now and arrives at the end of round t + r:

    delayed   P_i^t = D^(t-r)                                  zero in the first r rounds
    eager     P_i^t = D^(t-r) + (D_i^t - D_i^(t-r)) / n        own fresh share for the stale one;
                                                               D_i^t in the first r rounds
    z_i <- z_i + outer(P_i^t),   x_i <- z_i

Delayed anchors are replicated; eager ones differ a little between workers, and are averaged at the
end of training. Source of eager updates: Kale, Douillard & Donchev 2025, "Eager Updates for
Overlapped Communication and Computation in DiLoCo" (arXiv 2502.12996); its first round is ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, mean, size
from jaxcomm.sync._outer import check_communication, check_optimizer
from jaxcomm.sync._periodic import is_due
from jaxcomm.sync._rule import (
    Background,
    SyncRule,
    adopt,
    check_replicated,
    displacement,
    float32,
)
from jaxcomm.sync._schedules import Schedule, as_schedule, check_total_steps, round_end
from jaxcomm.transforms._average import average
from jaxcomm.transforms.common import Communication


class OverlappedState(NamedTuple):
    """State of `overlapped`; float32 trees like params, replicated (per worker where eager)."""

    anchor: optax.Params  # z
    outer: optax.OptState  # of the outer optimizer
    message: optax.OptState  # of the communication
    pending: tuple[optax.Updates, ...]  # replicated: the means on their way, next to arrive first
    own: tuple[optax.Updates, ...] | None  # per worker: this worker's shares of them; eager only
    next_sync: jax.Array  # shape=(), dtype=jnp.int32: local step at which this round ends
    sync_step: jax.Array  # shape=(), dtype=jnp.int32: meetings so far


def overlapped(
    axis_name: AxisName,
    every: Schedule | int,
    outer: optax.GradientTransformation,
    *,
    communication: Communication | None = None,
    rounds: int = 1,
    eager: bool = False,
    total_steps: int | None = None,
) -> SyncRule:
    """Meets as the schedule says, and uses what was sent `rounds` meetings ago.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      outer: Optax optimizer of the anchors; it does not communicate.
      communication: what averages the displacements; default `average(axis_name)`.
      rounds: r, how many rounds a transfer may take.
      eager: replace this worker's stale share by its fresh one; False uses the stale mean alone.
      total_steps: length of the training; the last round ends there, and eager anchors are averaged
        once, so that replicas end equal.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`. What is in flight is `state.pending`.

    Raises:
      ValueError: rounds < 1, an outer optimizer that communicates, a communication that does not.
    """
    if rounds < 1:
        raise ValueError(f"overlapped: rounds must be at least 1, got {rounds}; use periodic for 0")
    schedule = as_schedule(every, "overlapped")
    check_total_steps(total_steps, "overlapped")
    send = check_communication(communication or average(axis_name), "overlapped")
    optimizer = check_optimizer(outer, "overlapped")

    def init_fn(params):
        anchor = float32(params)
        zeros = (jax.tree.map(jnp.zeros_like, anchor),) * rounds
        zero = jnp.zeros((), jnp.int32)
        return OverlappedState(
            anchor=anchor,
            outer=optimizer.init(anchor),
            message=send.init(anchor),
            pending=zeros,
            own=zeros if eager else None,
            next_sync=round_end(schedule, zero, total_steps),
            sync_step=zero,
        )

    def leave(params, state, slot=0):
        del slot
        return displacement(state.anchor, params), state.anchor

    def travel(parcel, state, slot=0, step=None):
        del slot
        fresh, anchor = parcel
        arriving, message = send.update(fresh, state.message, anchor, local_step=step)
        check_replicated(arriving, state.pending[0], "overlapped")
        return state._replace(message=message, pending=(*state.pending[1:], arriving))

    def arrive(params, state, result, slot=0, step=None):
        del slot
        estimate, own = result, state.own
        if eager:
            fresh, first = displacement(state.anchor, params), state.sync_step < rounds
            estimate = _eager(fresh, estimate, own[0], first, size(axis_name))
            own = (*own[1:], fresh)
        updates, outer = optimizer.update(estimate, state.outer, state.anchor, local_step=step)
        anchor = optax.apply_updates(state.anchor, updates)
        return adopt(anchor, params), state._replace(anchor=anchor, outer=outer, own=own)

    def tick(state, step):
        next_sync = round_end(schedule, step, total_steps)
        return state._replace(next_sync=next_sync, sync_step=state.sync_step + 1)

    def apply_fn(params, state, step):
        def meet(params, state):
            far = travel(leave(params, state), state, step=step)
            params, near = arrive(params, state, state.pending[0], step=step)
            if eager and total_steps is not None:
                last = step == total_steps
                anchor = cond(last, lambda z: mean(z, axis_name), lambda z: z, near.anchor)
                params, near = adopt(anchor, params), near._replace(anchor=anchor)
            return params, tick(near._replace(message=far.message, pending=far.pending), step)

        return cond(is_due(state, step), meet, lambda *same: same, params, state)

    def clock(state, step):
        due = is_due(state, step)
        after = jax.tree.map(lambda new, old: jnp.where(due, new, old), tick(state, step), state)
        return after, due[None], due[None]

    def branches(launched, arrived):
        del arrived
        at_the_end = [0 if launched[0] else -1] * (eager and total_steps is not None)
        return [int(launched[0]), *at_the_end]

    background = Background(
        slots=1,
        near=("anchor", "outer", "own"),
        far=("message", "pending"),
        counters=("next_sync", "sync_step"),
        total_steps=total_steps,
        clock=clock,
        leave=leave,
        travel=travel,
        result=lambda state, slot: state.pending[0],
        arrive=arrive,
        branches=branches,
    )
    return SyncRule(init_fn, apply_fn, background=background)


def _eager(fresh, arrived, own, first, workers: int):
    """The arrived mean with this worker's fresh share in place of its stale one."""

    def leaf(new, mean, old):
        return jnp.where(first, new, mean + (new - old) / workers)

    return jax.tree.map(leaf, fresh, arrived, own)


def eager_diloco(
    axis_name: AxisName,
    every: Schedule | int = 500,
    *,
    rounds: int = 1,
    communication: Communication | None = None,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    total_steps: int | None = None,
) -> SyncRule:
    """DiLoCo with eager updates: no worker ever waits for a transfer.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      rounds: how many rounds a transfer may take, 1 or more.
      communication: what averages the displacements; default `average(axis_name)`.
      outer_learning_rate: learning rate of every worker's outer Nesterov SGD.
      outer_momentum: its momentum.
      total_steps: length of the training; anchors are averaged there.

    Raises:
      ValueError: as `overlapped`.
    """
    return overlapped(
        axis_name,
        every,
        optax.sgd(outer_learning_rate, momentum=outer_momentum, nesterov=True),
        communication=communication,
        rounds=rounds,
        eager=True,
        total_steps=total_steps,
    )
