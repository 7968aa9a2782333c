"""What every sync rule shares: its type, anchors and displacements."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import flatten
from jaxcomm.collectives.axis import varying_axes

ALIKE = 16  # leaves of one shape that are checked at once


class Background(NamedTuple):
    """How a rule's meetings come apart, so that other devices can make the transfers.

    The rule's state is a NamedTuple: `near` names the fields that computing devices hold, `far`
    those that live where the transfers are made, `counters` the int32 ones that the host knows.
    The functions see the state with None for the fields that are elsewhere; `slot` is a Python int
    (transfers of different slots may be in flight together), and in a step all that leaves has left
    before anything arrives:

    `clock(state, step) -> (state, launched, arrived)`: the counters after this step, bool (slots,).
    `leave(params, state, slot) -> parcel`: what this worker sends.
    `travel(parcel, state, slot, step) -> state`: the far state; the only part that communicates.
    `result(state, slot)`: what will arrive, of the far state.
    `arrive(params, state, result, slot, step) -> (params, state)`: the near state.
    `branches(launched, arrived)`: the choices of `apply`'s conditionals, as it would report them.
    """

    slots: int
    near: tuple[str, ...]
    far: tuple[str, ...]
    counters: tuple[str, ...]
    total_steps: int | None  # the last step is left to `apply`
    clock: Callable
    leave: Callable
    travel: Callable
    result: Callable
    arrive: Callable
    branches: Callable


class SyncRule(NamedTuple):
    """Pure functions around the local steps; every state has a counter `sync_step` of meetings.

    `init(params) -> state`.
    `apply(params, state, step) -> (params, state)` runs after every local step; `step` (int32)
    counts the local steps done. Meetings are gated by a conditional: no bytes move on other steps.

    Three hooks that most rules do without:
    `adjust(grads, params, state, step, obj_fn) -> (grads, state)` runs before the inner optimizer;
    `obj_fn(params)` is this worker's loss on its batch, and `step` counts the steps done before.
    Where the worker is to skip its step, all of `grads` is NaN.
    `moments(opt_state, initial_fn, state, step) -> opt_state` runs after `apply`, with the state
    and the step that `apply` was given; `initial_fn()` is a fresh inner optimizer state, of the
    parameters after it.
    `evaluated(params, state) -> params` says what to evaluate, if not the mean over the workers,
    which it is given, and returns where it has nothing better (before the first meeting). Called
    outside the axis: leaves of the state that differ between workers are their means.

    Rules whose results are used later than they are asked for have a `background`.
    """

    init: Callable[[optax.Params], Any]
    apply: Callable[[optax.Params, Any, jax.Array], tuple[optax.Params, Any]]
    adjust: Callable[..., tuple[optax.Updates, Any]] | None = None
    moments: Callable[..., optax.OptState] | None = None
    background: Background | None = None
    evaluated: Callable[[optax.Params, Any], optax.Params] | None = None


def hooks_of(rule: SyncRule) -> dict[str, Callable | None]:
    """The hooks of a rule that another one wraps, whose state holds the rule's as `state.rule`."""
    adjust, moments, evaluated = rule.adjust, rule.moments, rule.evaluated

    def adjust_fn(grads, params, state, step, obj_fn):
        assert adjust is not None
        grads, inner = adjust(grads, params, state.rule, step, obj_fn)
        return grads, state._replace(rule=inner)

    def moments_fn(opt_state, initial_fn, state, step):
        assert moments is not None
        return moments(opt_state, initial_fn, state.rule, step)

    def evaluated_fn(params, state):
        assert evaluated is not None
        return evaluated(params, state.rule)

    return {
        "adjust": None if adjust is None else adjust_fn,
        "moments": None if moments is None else moments_fn,
        "evaluated": None if evaluated is None else evaluated_fn,
    }


def float32(tree):
    """The tree with float32 leaves."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def all_finite(tree) -> jax.Array:
    """Are all leaves finite: a reduction for every 16 of one shape, element by element.

    Of very many leaves XLA has far fewer kernels so, to compile and to start.
    """
    alike: dict[tuple, list] = {}
    for x in jax.tree.leaves(tree):
        alike.setdefault(jnp.shape(x), []).append(jnp.isfinite(x))
    groups = [xs[i : i + ALIKE] for xs in alike.values() for i in range(0, len(xs), ALIKE)]
    every = [jnp.all(functools.reduce(jnp.logical_and, xs)) for xs in groups]
    return jnp.all(flatten([x.astype(jnp.float32) for x in every])[0] > 0)


def displacement(anchor, params):
    """anchor - params in float32: the pseudo-gradient."""
    return jax.tree.map(lambda z, x: z - jnp.asarray(x, jnp.float32), anchor, params)


def adopt(anchor, params):
    """The anchor in the dtypes of params: assigned, so that replicas are equal to the last bit."""
    return jax.tree.map(lambda z, x: z.astype(x.dtype), anchor, params)


def adopt_if(condition, anchor, params):
    """`adopt(anchor, params)` if the condition holds, else params."""
    choose = lambda z, x: jnp.where(condition, z, x)
    return jax.tree.map(choose, adopt(anchor, params), params)


def check_replicated(new, old, where: str) -> None:
    """Raises a ValueError if, by its type, the new anchor differs between workers."""
    pairs = zip(*map(jax.tree.leaves, (new, old)))
    if differs := sorted(set().union(*(varying_axes(a) - varying_axes(b) for a, b in pairs))):
        raise ValueError(
            f"{where}: the outer chain does not average over the workers along "
            f"{', '.join(map(repr, differs))}, where parameters differ as well, so that their "
            "anchors would drift apart: give the rule all worker axes, or start the chain with "
            "jaxcomm.average(axis_name) over all of them"
        )
