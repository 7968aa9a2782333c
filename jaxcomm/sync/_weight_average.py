"""Averages of what replicas agreed on: the last k meetings (LAWA), or all since a step (SWA).

Kept beside the training, which does not see them, and evaluated in place of its own parameters
(`step.consensus(state)`). What is averaged is the anchor: the rule must have one that all share.
Sources: Izmailov et al. 2018, SWA (arXiv 1803.05407); Kaddour 2022, LAWA (arXiv 2209.14981).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import cond
from jaxcomm.collectives.axis import varying_axes
from jaxcomm.collectives.primitives import sum_rows
from jaxcomm.sync._rule import SyncRule, adopt_if, hooks_of


class WeightAverageState(NamedTuple):
    """State of `weight_average`; replicated, but for what is per worker in the rule's."""

    rule: Any  # state of the wrapped rule
    weights: optax.Params  # float32: the last k, leading axis k; or their running mean
    count: jax.Array  # shape=(), dtype=jnp.int32: meetings taken in so far

    @property
    def sync_step(self) -> jax.Array:
        """Meetings of the wrapped rule."""
        return self.rule.sync_step


def weight_average(rule: SyncRule, *, last: int | None = None, start: int = 0) -> SyncRule:
    """Also averages the anchor of a rule over its meetings.

    Args:
      rule: a sync rule whose anchor is replicated (`periodic`, `streaming`, `co2`, ...).
      last: k, average the last k meetings, which are all kept; None for a running mean.
      start: local step up to which meetings are left out.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`. `step.consensus(state)` is the average; before
      there is one, what it would be with the rule alone.

    Raises:
      ValueError: last < 1 or start < 0; when traced, a rule whose workers share no anchor.
    """
    if last is not None and last < 1:
        raise ValueError(f"weight_average: last must be at least 1, got {last}")
    if start < 0:
        raise ValueError(f"weight_average: start must not be negative, got {start}")

    def init_fn(params):
        lead = () if last is None else (last,)
        weights = jax.tree.map(lambda x: jnp.zeros(lead + x.shape, jnp.float32), params)
        return WeightAverageState(rule.init(params), weights, jnp.zeros((), jnp.int32))

    def apply_fn(params, state, step):
        params, new = rule.apply(params, state.rule, step)
        met = (new.sync_step > state.rule.sync_step) & (step > start)
        agreed = _agreed(new)
        take = lambda weights, x: _take(weights, x, state.count, last)
        weights = cond(met, take, lambda weights, x: weights, state.weights, agreed)
        return params, WeightAverageState(new, weights, state.count + met)

    hooks = hooks_of(rule)
    before = hooks["evaluated"] or (lambda params, state: params)

    def evaluated_fn(params, state):
        average = _average(state, last)
        return adopt_if(state.count > 0, average, before(params, state))

    return SyncRule(init_fn, apply_fn, **{**hooks, "evaluated": evaluated_fn})


def _agreed(state):
    anchor = getattr(state, "anchor", None)
    if anchor is None or any(varying_axes(x) for x in jax.tree.leaves(anchor)):
        raise ValueError("weight_average: needs a rule whose workers share one anchor")
    return anchor


def _take(weights, agreed, count, last: int | None):
    if last is None:
        return jax.tree.map(lambda w, x: w + (x - w) / (count + 1), weights, agreed)
    return jax.tree.map(lambda w, x: w.at[count % last].set(x), weights, agreed)


def _average(state: WeightAverageState, last: int | None):
    if last is None:
        return state.weights
    # places not yet filled are zero
    filled = jnp.clip(state.count, 1, last)
    return jax.tree.map(lambda w: sum_rows(w) / filled, state.weights)


def averaged_weights(state: WeightAverageState, *, last: int | None = None):
    """The average, float32, from the sync state of a rule made by `weight_average`.

    Args:
      state: `train_state.sync_state`.
      last: the `last` that the rule was made with; None for a running mean.

    Raises:
      ValueError: nothing has been averaged yet.
    """
    if int(jnp.max(state.count)) == 0:
        raise ValueError("averaged_weights: no meeting has been averaged yet")
    return _average(state, last)
