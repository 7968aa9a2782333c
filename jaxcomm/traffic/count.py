"""How many bytes a worker sends in a step, read off the traced program.

The step is traced over the abstract worker axis and its collectives are counted, those that the
user wrote included. A worker sends, with n workers along the axis and an operand of b bytes:

    all-reduce        2 (n-1)/n b        (ring)
    all-gather        (n-1) b
    all-to-all        (n-1)/n b
    reduce-scatter    (n-1)/n b
    permute           b

Bytes inside a conditional count on the steps that take that branch: `jaxcomm.collectives.cond`
reports its choices as an output of the step, so the sum over a run is exact.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxcomm.collectives import conditional, primitives

_OPS = {
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter",
    "ppermute": "permute",
}
_SHARE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "permute": lambda n: 1 if n > 1 else 0,
}
UNNAMED = "unnamed"  # part of a collective that the library did not make


class Collective(NamedTuple):
    """One collective of the program."""

    op: str  # all-reduce, all-gather, all-to-all, reduce-scatter or permute
    axes: tuple[str, ...]  # along which it communicates
    workers: int  # along these axes
    dtype: str  # of the operand on the wire
    shape: tuple[int, ...]  # of one worker's operand
    part: str  # values, scale, indices, metrics, dense, ...
    times: int  # a step (inside scans)
    when: tuple[tuple[str, int], ...]  # conditionals around it: (name, branch)

    @property
    def operand_bytes(self) -> int:
        """Bytes of the operand, all repetitions together."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize * self.times

    @property
    def sent_bytes(self) -> float:
        """Bytes that one worker sends, all repetitions together."""
        return _SHARE[self.op](self.workers) * self.operand_bytes


class Traffic(NamedTuple):
    """What a step puts on the wire; `print` it, or read its fields."""

    collectives: tuple[Collective, ...]
    choices: tuple[str, ...]  # names of the conditionals, in the order of metrics['branches']
    workers: int
    elements: int  # parameters of one replica

    def step_bytes(self, branches: Sequence[int] = ()) -> float:
        """Bytes a worker sends in a step that took these branches (`metrics['branches']`)."""
        taken = {name: int(b) for name, b in zip(self.choices, branches)}
        runs = lambda c: all(taken.get(name, branch) == branch for name, branch in c.when)
        return sum(c.sent_bytes for c in self.collectives if runs(c))

    @property
    def every_step_bytes(self) -> float:
        """Bytes a worker sends in every step."""
        return sum(c.sent_bytes for c in self.collectives if not c.when)

    @property
    def conditional_bytes(self) -> float:
        """Bytes a worker sends when every conditional takes its dearest branch, beyond that."""
        return self.largest_step_bytes - self.every_step_bytes

    @property
    def largest_step_bytes(self) -> float:
        """Bytes of the dearest step, conditionals resolved branch by branch."""
        return self.every_step_bytes + _dearest([c for c in self.collectives if c.when], 0)

    def by(self, field: str) -> dict[str, float]:
        """Bytes a worker sends by 'op', 'axes', 'dtype' or 'part', conditional ones included."""
        totals: dict[str, float] = {}
        for c in self.collectives:
            key = ",".join(c.axes) if field == "axes" else getattr(c, field)
            totals[key] = totals.get(key, 0.0) + c.sent_bytes
        return totals

    @property
    def metadata_bytes(self) -> float:
        """Bytes of scales, indices and seeds: all that is neither values nor dense nor metrics."""
        payload = ("values", "dense", "metrics", UNNAMED)
        return sum(c.sent_bytes for c in self.collectives if c.part not in payload)

    @property
    def dense_equivalent_bytes(self) -> float:
        """Bytes that averaging all parameters in float32 once would send."""
        return _SHARE["all-reduce"](self.workers) * 4 * self.elements


def _dearest(collectives: list[Collective], depth: int) -> float:
    """Largest sum over choices of branches of the collectives inside them."""
    here = sum(c.sent_bytes for c in collectives if len(c.when) <= depth)
    inner = [c for c in collectives if len(c.when) > depth]
    for name in dict.fromkeys(c.when[depth][0] for c in inner):
        mine = [c for c in inner if c.when[depth][0] == name]
        branches = {c.when[depth][1] for c in mine}
        here += max(
            _dearest([c for c in mine if c.when[depth][1] == b], depth + 1) for b in branches
        )
    return here


def traffic(step, state, batch) -> Traffic:
    """Counts what one worker sends in a training step.

    Args:
      step: a TrainStep, in any mode.
      state: its state; arrays or their shapes.
      batch: a global batch; arrays or their shapes.

    Returns:
      A Traffic: every collective with its bytes, and sums over them.
    """
    jaxpr = step.trace(state, batch)
    sizes = dict(zip(step.workers.names, step.workers.sizes))
    collectives = tuple(_walk(jaxpr.jaxpr, sizes, 1, ()))
    leaves = jax.tree.leaves(jax.eval_shape(step.consensus, jax.tree.map(_shape, state)))
    elements = sum(math.prod(leaf.shape) for leaf in leaves)
    return Traffic(collectives, step.choice_names, step.workers.count, elements)


def count(fn, *args, axis_sizes: dict[str, int]) -> tuple[Collective, ...]:
    """The collectives of any function of arrays, traced with these axes in scope."""
    jaxpr = jax.make_jaxpr(fn, axis_env=tuple(axis_sizes.items()))(*args)
    return tuple(_walk(jaxpr.jaxpr, axis_sizes, 1, ()))


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _walk(jaxpr, sizes: dict[str, int], times: int, when: tuple) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _OPS:
            yield from _collectives(eqn, sizes, times, when)
            continue
        repeat = times * eqn.params["length"] if name == "scan" else times
        for label, inner in _inner(eqn):
            yield from _walk(inner, sizes, repeat, when + label)


def _inner(eqn) -> Iterator[tuple[tuple, object]]:
    """Sub-programs of an equation, with the branch that each stands for."""
    if eqn.primitive.name == "cond":
        name = _scope(eqn, conditional.SCOPE) or f"unmetered@{id(eqn)}"
        for i, branch in enumerate(eqn.params["branches"]):
            yield ((name, i),), branch.jaxpr
        return
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield (), inner


def _collectives(eqn, sizes, times, when) -> Iterator[Collective]:
    params = eqn.params
    names = params.get("axes", params.get("axis_name"))
    names = names if isinstance(names, (tuple, list)) else (names,)
    axes = tuple(name for name in names if isinstance(name, str))
    workers = math.prod(sizes.get(name, 1) for name in axes)
    part = _scope(eqn, primitives.SCOPE) or UNNAMED
    op = _OPS[eqn.primitive.name]
    for var in eqn.invars:
        aval = var.aval
        if axes and aval.size:
            yield Collective(op, axes, workers, str(aval.dtype), aval.shape, part, times, when)


def _scope(eqn, prefix: str) -> str | None:
    """The innermost name scope of the equation that starts with the prefix, without it."""
    found = re.findall(re.escape(prefix) + r"([^/()\s]+)", str(eqn.source_info.name_stack))
    return found[-1] if found else None
