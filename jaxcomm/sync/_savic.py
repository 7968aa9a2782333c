r"""SAVIC: local steps scaled by a diagonal that is only refreshed when replicas have met.

    local    x_i <- x_i - gamma g_i / D^,    D^ = min(max(|D|, floor), ceiling)
    refresh  at the first gradient after a meeting, taken where all are equal:
             adam       D^2 <- beta_t D^2 + (1 - beta_t) g^2
             rmsprop    D^2 <- beta D^2 + (1 - beta) g^2
             adahessian D^2 <- beta D^2 + (1 - beta) h^2
             oasis      D   <- beta D + (1 - beta) h

with beta_t = (beta - beta^(t+1)) / (1 - beta^(t+1)) at estimate t = 0, 1, ..., and Hutchinson's
h = z * (Hessian z) for a vector z of random signs. D starts at its first estimate. Global scaling
averages g (or h) over the workers, one more vector a round; local scaling uses each worker's own
and costs nothing. An estimate that is not finite does not count: the average is that of the other
workers; without any, D stays as it is (1 before its first estimate) until the next refresh.

Source: Chezhegov et al. 2024, "Local Methods with Adaptivity via Scaling" (arXiv 2406.00846).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, index, mean
from jaxcomm.sync._periodic import PeriodicState, local_sgd
from jaxcomm.sync._rule import SyncRule, all_finite, float32, hooks_of
from jaxcomm.sync._schedules import Schedule

RULES = ("adam", "rmsprop", "oasis", "adahessian")


class SavicState(NamedTuple):
    """State of `savic`; with local scaling D and the number of its estimates are per worker."""

    rule: PeriodicState  # of the meetings
    scale: optax.Updates  # float32, like params: D; 1 before its first estimate
    refreshes: jax.Array  # shape=(), dtype=jnp.int32; replicated: of D so far
    estimates: jax.Array  # shape=(), dtype=jnp.int32: t, refreshes that had a finite estimate

    @property
    def anchor(self) -> optax.Params:
        """What replicas agreed on."""
        return self.rule.anchor

    @property
    def sync_step(self) -> jax.Array:
        """Meetings so far."""
        return self.rule.sync_step


def savic(
    axis_name: AxisName,
    every: Schedule | int,
    *,
    rule: str = "adam",
    scaling: str = "global",
    b2: float = 0.999,
    floor: float = 1e-3,
    ceiling: float | None = None,
    moments: str = "local",
    seed: int = 0,
    total_steps: int | None = None,
) -> SyncRule:
    """Local SGD (or any inner optimizer) on gradients that are scaled between meetings.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      rule: 'adam', 'rmsprop', 'oasis' or 'adahessian'. The last two take a Hessian-vector product
        of the loss at every refresh.
      scaling: 'global' or 'local'.
      b2: beta.
      floor: smallest D^; a coordinate without gradient at the refresh is scaled by 1 / floor.
      ceiling: largest D^; None has none.
      moments: inner optimizer states at a meeting: 'local', 'average' or 'reset'.
      seed: seeds z.
      total_steps: length of the training; the last round ends there.

    Returns:
      A SyncRule for `make_train_step(loss_fn, optax.sgd(gamma), sync=...)`.

    Raises:
      ValueError: an unknown rule or scaling, b2 outside [0, 1), or not 0 < floor <= ceiling.
    """
    _check(rule, scaling, b2, floor, ceiling)
    meetings = local_sgd(axis_name, every, moments=moments, total_steps=total_steps)
    average = (lambda tree: mean(tree, axis_name)) if scaling == "global" else lambda tree: tree

    def init_fn(params):
        zero = jnp.zeros((), jnp.int32)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params)
        return SavicState(meetings.init(params), ones, zero, zero)

    def adjust_fn(grads, params, state, step, obj_fn):
        del step

        def refresh(scale, estimates):
            if rule in ("adam", "rmsprop"):
                estimate = float32(grads)
            else:
                key = jax.random.fold_in(jax.random.key(seed), state.refreshes)
                estimate = _hessian_diagonal(
                    obj_fn, params, jax.random.fold_in(key, index(axis_name))
                )
            finite = all_finite(estimate)
            counted = jax.tree.map(lambda h: jnp.where(finite, h, 0.0), estimate)
            total, share = average((counted, finite.astype(jnp.float32)))
            beta = _weight(rule, b2, estimates)
            blend = lambda d, h: _blend(d, h / share, beta, linear=rule == "oasis")
            return jax.tree.map(blend, scale, total), estimates + (share > 0)

        due = state.refreshes <= state.rule.sync_step  # the replicas have met since
        scale, estimates = cond(due, refresh, lambda *same: same, state.scale, state.estimates)
        bounded = jax.tree.map(lambda d: jnp.clip(jnp.abs(d), floor, ceiling), scale)
        grads = jax.tree.map(lambda g, d: (g / d).astype(g.dtype), grads, bounded)
        return grads, SavicState(state.rule, scale, state.refreshes + due, estimates)

    def apply_fn(params, state, step):
        params, new = meetings.apply(params, state.rule, step)
        return params, state._replace(rule=new)

    return SyncRule(init_fn, apply_fn, adjust_fn, hooks_of(meetings)["moments"])


def _hessian_diagonal(obj_fn, params, key):
    """Hutchinson's estimate z * (Hessian z) with one vector z of random signs, float32."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    z = jax.tree.unflatten(treedef, signs)
    _, product = jax.jvp(jax.grad(obj_fn), (params,), (z,))
    return float32(jax.tree.map(lambda z, hz: z * hz, z, product))


def _weight(rule: str, b2: float, estimates):
    """beta_t; 0 at the first estimate."""
    if rule == "adam":
        power = b2 ** (estimates.astype(jnp.float32) + 1)
        return (b2 - power) / (1 - power)
    return jnp.where(estimates == 0, 0.0, b2)


def _blend(d, h, beta, linear: bool):
    """The new D; the old one where the estimate is not finite (0 / 0 if it is nobody's)."""
    new = beta * d + (1 - beta) * h if linear else jnp.sqrt(beta * d**2 + (1 - beta) * h**2)
    return jnp.where(jnp.isfinite(new), new, d)


def _check(rule, scaling, b2, floor, ceiling) -> None:
    if rule not in RULES:
        raise ValueError(f"savic: rule must be one of {RULES}, got {rule!r}")
    if scaling not in ("global", "local"):
        raise ValueError(f"savic: scaling must be 'global' or 'local', got {scaling!r}")
    if not 0 <= b2 < 1:
        raise ValueError(f"savic: b2 must be in [0, 1), got {b2}")
    if not 0 < floor <= (floor if ceiling is None else ceiling):
        raise ValueError(f"savic: needs 0 < floor <= ceiling, got {floor=} and {ceiling=}")
