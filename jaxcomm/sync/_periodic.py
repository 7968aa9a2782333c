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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond
from jaxcomm.collectives.axis import varying_axes
from jaxcomm.sync._schedules import Schedule
from jaxcomm.sync._schedules import every as every_steps
from jaxcomm.transforms._average import average
from jaxcomm.transforms.common import Communication


class SyncRule(NamedTuple):
    """A pair of pure functions, called once after every local step.

    `apply(params, state, step) -> (params, state)`; `step` (int32) counts the local steps done.
    Meetings are gated by a conditional: no bytes move on the other steps.
    """

    init: Callable[[optax.Params], Any]
    apply: Callable[[optax.Params, Any, jax.Array], tuple[optax.Params, Any]]


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
    total_steps: int | None = None,
) -> SyncRule:
    """Meets as the schedule says and moves the anchor by the outer transform.

    Args:
      outer: a jaxcomm communication, or an Optax chain that contains one and ends in an optimizer.
      every: a schedule (`every`, `qsr`, ...), or a number of local steps.
      total_steps: length of the training; the last round ends there.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`.

    Raises:
      ValueError: a round of less than one step; at trace time, an outer chain that does not
        average over workers.
    """
    schedule = every_steps(every) if isinstance(every, int) else every
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"periodic: total_steps must be at least 1, got {total_steps}")
    # a bare communication keeps the direction of its input: subtract it
    chain = optax.chain(outer, optax.scale(-1.0)) if isinstance(outer, Communication) else outer
    chain = optax.with_extra_args_support(chain)

    def round_end(step):
        end = step + jnp.maximum(jnp.asarray(schedule(step), jnp.int32), 1)
        return end if total_steps is None else jnp.minimum(end, jnp.maximum(total_steps, step + 1))

    def init_fn(params):
        anchor = jax.tree.map(_float32, params)
        zero = jnp.zeros((), jnp.int32)
        return PeriodicState(anchor, chain.init(anchor), round_end(zero), zero)

    def apply_fn(params, state, step):
        def meet(params, state):
            displacement = jax.tree.map(lambda z, x: z - _float32(x), state.anchor, params)
            updates, inner = chain.update(displacement, state.outer, state.anchor)
            anchor = optax.apply_updates(state.anchor, updates)
            _check_replicated(anchor, state.anchor)
            own = jax.tree.map(lambda z, x: z.astype(x.dtype), anchor, params)
            return own, PeriodicState(anchor, inner, round_end(step), state.sync_step + 1)

        stay = lambda params, state: (params, state)
        return cond(step >= state.next_sync, meet, stay, params, state)

    return SyncRule(init_fn, apply_fn)


def _float32(x):
    return jnp.asarray(x, jnp.float32)


def _check_replicated(new, old):
    if any(varying_axes(a) - varying_axes(b) for a, b in zip(*map(jax.tree.leaves, (new, old)))):
        raise ValueError(
            "periodic: the outer chain does not average over the workers, so that their anchors "
            "would drift apart; start it with jaxcomm.average(axis_name)"
        )


def local_sgd(
    axis_name: AxisName, every: Schedule | int, *, total_steps: int | None = None
) -> SyncRule:
    """Local SGD (with any inner optimizer): averages the parameters at the end of every round.

    Inner optimizer states stay on their worker, neither averaged nor reset.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps; `qsr(...)` gives the QSR method.
      total_steps: length of the training; the last round ends there.
    """
    return periodic(average(axis_name), every, total_steps=total_steps)


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
