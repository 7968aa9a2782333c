"""Meeting rarely: one rule for local SGD, DiLoCo and every outer optimizer.

Between meetings each worker trains its own parameters x_i. At a meeting, with anchor z,

    D_i = z - x_i                    displacement, the pseudo-gradient
    z  <- z + outer(D_i)             outer: any Optax chain that contains a jaxcomm collective
    x_i <- z                         assigned, so that replicas are equal to the last bit

A bare communication (`average`, `error_feedback`, ...) as `outer` moves the anchor by minus its
result: local SGD. A chain must end in an optimizer, whose update already points downhill:
`optax.chain(average(axis), optax.sgd(0.7, momentum=0.9, nesterov=True))` is DiLoCo.

Sources: Stich 2019 (local SGD, arXiv 1805.09767); Douillard et al. 2023 (DiLoCo, arXiv 2311.08105).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond
from jaxcomm.sync._moments import Moments, at_meetings
from jaxcomm.sync._outer import downhill
from jaxcomm.sync._rule import SyncRule, adopt, check_replicated, displacement, float32
from jaxcomm.sync._schedules import Schedule, as_schedule, check_total_steps, round_end
from jaxcomm.transforms._average import average


class PeriodicState(NamedTuple):
    """State of `periodic`; all replicated."""

    anchor: optax.Params  # float32, like params: z
    outer: optax.OptState  # of the outer chain
    next_sync: jax.Array  # shape=(), dtype=jnp.int32: local step at which this round ends
    sync_step: jax.Array  # shape=(), dtype=jnp.int32: meetings so far


def periodic(
    outer: optax.GradientTransformation,
    every: Schedule | int,
    *,
    moments: Moments = "local",
    total_steps: int | None = None,
) -> SyncRule:
    """Meets as the schedule says and moves the anchor by the outer transform.

    The outer chain is given `local_step` as an extra argument; its own counters count meetings. It
    is tried out on a small tree here, so build rules after `jax.distributed.initialize`.

    Args:
      outer: a jaxcomm communication, or an Optax chain that contains one and ends in an optimizer.
      every: a schedule (`every`, `qsr`, ...), or a number of local steps.
      moments: inner optimizer states at a meeting: 'local' (kept), `average(axis_name)`, or 'reset'
        (fresh, but for states that are only a counter, such as a learning-rate schedule's; a
        counter beside floats in one state, as schedule_free's, starts again).
      total_steps: length of the training; the last round ends there. Without it a training may
        end between meetings.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`.

    Raises:
      ValueError: a round of less than one step; an outer chain that does not average over workers
        or does not end in an optimizer (some chains are only found out when they are traced).

    Example:
      >>> import optax, jaxcomm
      >>> ef = jaxcomm.error_feedback(jaxcomm.top_k(0.01), "workers")
      >>> rule = jaxcomm.periodic(optax.chain(ef, optax.sgd(0.7, momentum=0.9)), every=30)
    """
    schedule = as_schedule(every, "periodic")
    check_total_steps(total_steps, "periodic")
    chain = downhill(outer, "periodic")

    def init_fn(params):
        anchor = float32(params)
        zero = jnp.zeros((), jnp.int32)
        return PeriodicState(
            anchor, chain.init(anchor), round_end(schedule, zero, total_steps), zero
        )

    def apply_fn(params, state, step):
        def meet(params, state):
            updates, outer = chain.update(
                displacement(state.anchor, params), state.outer, state.anchor, local_step=step
            )
            anchor = optax.apply_updates(state.anchor, updates)
            check_replicated(anchor, state.anchor, "periodic")
            next_sync = round_end(schedule, step, total_steps)
            new = PeriodicState(anchor, outer, next_sync, state.sync_step + 1)
            return adopt(anchor, params), new

        return cond(is_due(state, step), meet, lambda *same: same, params, state)

    return SyncRule(init_fn, apply_fn, moments=at_meetings(moments, is_due, "periodic"))


def is_due(state, step: jax.Array) -> jax.Array:
    """Does the round end with this local step?"""
    return step >= state.next_sync


def local_sgd(
    axis_name: AxisName,
    every: Schedule | int,
    *,
    moments: str = "local",
    total_steps: int | None = None,
) -> SyncRule:
    """Local SGD (with any inner optimizer): averages the parameters at the end of every round.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps; `qsr(...)` gives the QSR method.
      moments: inner optimizer states at a meeting: 'local' (kept), 'average' or 'reset'.
      total_steps: length of the training; the last round ends there.
    """
    mean = average(axis_name)
    return periodic(
        mean, every, moments=mean if moments == "average" else moments, total_steps=total_steps
    )


def diloco(
    axis_name: AxisName,
    every: Schedule | int = 500,
    *,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    total_steps: int | None = None,
) -> SyncRule:
    """DiLoCo: local steps, then Nesterov SGD on the averaged displacement.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      outer_learning_rate: learning rate of the outer Nesterov SGD.
      outer_momentum: its momentum.
      total_steps: length of the training; the last round ends there.
    """
    step = optax.sgd(outer_learning_rate, momentum=outer_momentum, nesterov=True)
    return periodic(optax.chain(average(axis_name), step), every, total_steps=total_steps)


def fed_opt(
    axis_name: AxisName,
    every: Schedule | int,
    outer: optax.GradientTransformation,
    *,
    total_steps: int | None = None,
) -> SyncRule:
    """FedOpt: any Optax optimizer on the averaged displacement; FedAvg with optax.sgd(1.0).

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      outer: the server's optimizer, for example optax.adam(0.01) for FedAdam.
      total_steps: length of the training; the last round ends there.

    References:
      Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv 2003.00295).
    """
    return periodic(optax.chain(average(axis_name), outer), every, total_steps=total_steps)
