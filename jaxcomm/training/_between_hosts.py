"""The collectives of a program between CPU hosts, in ways that suit Gloo better.

Small sums and gathers go straight to everybody (`jaxcomm.collectives.direct`), large all-to-alls
in rounds (`jaxcomm.collectives.rounds`), and so do large gathers of two hosts, where Gloo's ring is
a mutual exchange: the same values for the same bytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis, direct, rounds
from jaxcomm.traffic.count import named_axes
from jaxcomm.traffic.evaluate import bind, evaluate
from jaxcomm.training._program import communicates


def between_hosts(fn: Callable) -> Callable:
    """The same function of one worker, traced where the worker axes are bound."""

    def run(*args):
        program, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        found = evaluate(program, jax.tree.leaves(args), rule)
        return jax.tree.unflatten(jax.tree.structure(out), found)

    return run


def rule(eqn, args: list) -> list | None:
    """What an equation gives, for `evaluate`."""
    name, axes, params = eqn.primitive.name, named_axes(eqn), eqn.params
    if not communicates(eqn) or name == "shard_map":  # one inside, over other axes, has blocks
        return bind(eqn, args)
    if not axes or len(args) != 1:
        return None
    (x,), n = args, axis.size(axes)
    if name == "psum_invariant":
        small = direct.worth_it("all-reduce", x.nbytes, n) and x.dtype == jnp.float32
        return [direct.direct_sum(x, axes)] if small and params == {"axes": axes} else None
    if params.get("tiled", True) or params.get("axis_index_groups"):
        return None
    if name == "all_gather_invariant" and params["all_gather_dimension"] == 0:
        if direct.worth_it("all-gather", x.nbytes, n):
            return [direct.direct_gather(x, axes)]
        return [direct.direct_gather(x, axes, rounds.all_to_all)] if n == 2 else None
    if name == "all_to_all" and params["split_axis"] == params["concat_axis"] == 0:
        return [rounds.all_to_all(x, axes)] if rounds.worth_it(x.nbytes, n) else None
    return None
