"""How many bytes a worker sends in a step, read off the traced program.

The step is traced over the abstract worker axis and its collectives are counted, those that the
user wrote included; no device takes part, so 4,096 workers are counted as fast as two. What each
collective costs a worker is in `jaxcomm.traffic.ledger`. `jaxcomm.collectives.cond` reports its
choices as an output of the step, so that the sum over a run is exact. A collective inside a
`lax.while_loop` counts once, because nobody knows the number of rounds.
"""

import math
import re
from collections.abc import Iterator

import jax

from jaxcomm.collectives import conditional, exchange, primitives
from jaxcomm.collectives.left_dense import record_left_dense
from jaxcomm.traffic.ledger import UNMETERED, UNNAMED, Collective, Traffic

OPS = {
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter",
    "ppermute": "permute",
}
# they name an axis and send nothing
_SILENT = {"axis_index", "pvary", "pcast", "preduced", "vary_unreduced_cast"}


def traffic(step, state, batch) -> Traffic:
    """Counts what one worker sends in a training step.

    Args:
      step: a TrainStep, in any mode.
      state: its state; arrays or their shapes.
      batch: a global batch; arrays or their shapes.

    Returns:
      A Traffic: every collective with its bytes, sums over them, and what a compressing method
      leaves dense.

    Raises:
      ValueError: rows that the workers do not divide, or a collective whose bytes are not known
        here.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxcomm
      >>> tx = optax.chain(jaxcomm.error_feedback(jaxcomm.sign(), "workers"), optax.sgd(0.1))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=4)
      >>> state = step.abstract_state(jnp.zeros(800), jax.random.key(0))
      >>> report = jaxcomm.traffic(step, state, jnp.ones((4, 800)))
      >>> report.by("part")  # 3 others are sent 100 bytes of signs and a scale
      {'metrics': 12.0, 'values': 300.0, 'scale': 12.0}
    """
    step.workers.check_batch(batch)
    params = jax.eval_shape(step.consensus, jax.tree.map(_shape, state))
    with record_left_dense() as left_dense:  # by an init_fn or an update_fn
        step.abstract_state(params, _shape(state.key))
        jaxpr = step.trace(state, batch)
    sizes = dict(zip(step.workers.names, step.workers.sizes))
    collectives = tuple(_walk(jaxpr.jaxpr, sizes))
    elements = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    count, choices = step.workers.count, step.choice_names
    return Traffic(collectives, choices, count, elements, tuple(left_dense))


def count(fn, *args, axis_sizes: dict[str, int]) -> tuple[Collective, ...]:
    """The collectives of any function of arrays, traced with these axes in scope."""
    jaxpr = jax.make_jaxpr(fn, axis_env=tuple(axis_sizes.items()))(*args)
    return tuple(_walk(jaxpr.jaxpr, axis_sizes))


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _walk(
    jaxpr, sizes: dict[str, int], times: int = 1, when: tuple = (), way: str = ""
) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        inside = name_scope(eqn, exchange.SCOPE) or way  # scopes end at the edge of a scan's body
        if axes := named_axes(eqn):
            if op := OPS.get(eqn.primitive.name.removesuffix("_start")):
                yield from _collectives(eqn, op, axes, sizes, (times, when, inside))
                continue
            if eqn.primitive.name not in _SILENT and not eqn.primitive.name.endswith("_done"):
                raise ValueError(
                    f"the bytes of the collective {eqn.primitive.name!r} over {axes} are not known"
                )
        repeat = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for label, inner in sub_programs(eqn):
            yield from _walk(inner, sizes, repeat, when + label, inside)


def sub_programs(eqn) -> Iterator[tuple[tuple, object]]:
    """Sub-programs of an equation, with the branch that each stands for."""
    if eqn.primitive.name == "cond":
        name = name_scope(eqn, conditional.SCOPE) or f"{UNMETERED}@{id(eqn)}"
        for i, branch in enumerate(eqn.params["branches"]):
            yield ((name, i),), branch.jaxpr
        return
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield (), inner


def mentions(jaxpr, names: tuple[str, ...]) -> bool:
    """Whether the program communicates along one of the axes, or asks for the worker's index."""
    return any(
        set(named_axes(eqn)) & set(names)
        or any(mentions(inner, names) for _, inner in sub_programs(eqn))
        for eqn in jaxpr.eqns
    )


def named_axes(eqn) -> tuple[str, ...]:
    """The names of the axes that an equation's `axes` or `axis_name` lists (positions left out)."""
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    names = names if isinstance(names, (tuple, list)) else (names,)
    return tuple(name for name in names if isinstance(name, str))


def _collectives(eqn, op, axes, sizes, context: tuple) -> Iterator[Collective]:
    workers = math.prod(sizes.get(name, 1) for name in axes)
    part = name_scope(eqn, primitives.SCOPE) or UNNAMED
    for var in eqn.invars:
        shape, dtype = var.aval.shape, str(var.aval.dtype)
        if math.prod(shape):
            yield Collective(op, axes, workers, dtype, shape, part, *context)


def name_scope(eqn, prefix: str) -> str | None:
    """The innermost name scope of the equation that starts with the prefix, without it."""
    found = re.findall(re.escape(prefix) + r"([^/()\s]+)", str(eqn.source_info.name_stack))
    return found[-1] if found else None
