"""What happens to the inner optimizers' states when replicas meet: by default nothing.

local     kept as they are: neither averaged nor reset
averaged  floating-point leaves become their mean over the workers
reset     as a fresh inner optimizer starts, but for states that are only a counter: the clock of
          a learning-rate schedule goes on
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.collectives import cond
from jaxcomm.transforms.common import Communication

Moments = str | Communication


def at_meetings(moments: Moments, is_due: Callable, where: str) -> Callable | None:
    """The `moments` hook of a SyncRule, or None where inner states stay local.

    Args:
      moments: 'local', 'reset', or the communication that averages, e.g. `average(axis_name)`.
      is_due: `is_due(state, step)` of the rule, a replicated boolean.
      where: the rule's name, for errors.

    Raises:
      ValueError: anything else.
    """
    if isinstance(moments, Communication):
        meet = _averaged(moments, where)
    elif moments == "reset":
        meet = _reset
    elif moments == "local":
        return None
    else:
        raise ValueError(
            f"{where}: moments must be 'local', 'reset' or jaxcomm.average(axis_name), "
            f"got {moments!r}"
        )

    def hook(opt_state, initial_fn, state, step):
        return cond(is_due(state, step), lambda s: meet(s, initial_fn), lambda s: s, opt_state)

    return hook


def _averaged(communication: Communication, where: str) -> Callable:
    memory = communication.init({})
    if jax.tree.leaves(memory):
        raise ValueError(f"{where}: moments can only be averaged without memory: use average(...)")

    def meet(opt_state, initial_fn):
        del initial_fn
        leaves, treedef = jax.tree.flatten(opt_state)
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        means, _ = communication.update([x for x, f in zip(leaves, floats) if f], memory)
        averaged = iter(jax.tree.leaves(means))
        new = [next(averaged) if f else x for x, f in zip(leaves, floats)]
        return jax.tree.unflatten(treedef, new)

    return meet


def _reset(opt_state, initial_fn):
    return jax.tree.map(
        lambda old, fresh: old if _is_clock(old) else fresh,
        opt_state,
        initial_fn(),
        is_leaf=_is_clock,
    )


def _is_clock(node) -> bool:
    """A NamedTuple state without any floating-point leaf, such as a schedule's counter."""
    leaves = jax.tree.leaves(node)
    is_state = isinstance(node, tuple) and hasattr(node, "_fields")
    return is_state and not any(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
