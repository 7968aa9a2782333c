"""A traced step as a list of operations on numbered values, to be put together otherwise."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from jaxcomm.collectives.axis import varying_axes
from jaxcomm.traffic.count import OPS, named_axes, sub_programs


class Constant(NamedTuple):
    """A value that the program has in itself."""

    value: Any


class Op(NamedTuple):
    """An operation on numbered values; `run(bind, *values)` gives its outputs."""

    run: Callable[..., Sequence]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    eqn: Any = None

    @property
    def travels(self) -> bool:
        """Whether it is a collective or has one in it."""
        return self.eqn is not None and communicates(self.eqn)


class Piece(NamedTuple):
    """Operations that run as one program."""

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __call__(self, args: Iterable, bind: Callable[[Any, list], Sequence]) -> list:
        """The outputs for the inputs, one worker's; `bind(eqn, values)` gives an equation's."""
        known = dict(zip(self.inputs, args))
        for op in self.ops:
            known.update(zip(op.outputs, op.run(bind, *(known[v] for v in op.inputs))))
        return [known[v] for v in self.outputs]


class Program:
    """The operations of a program that its outputs depend on, and those with an effect (a print).

    Args:
      closed: a closed jaxpr of one `shard_map`, as `TrainStep.trace` makes it.
    """

    def __init__(self, closed):
        self.ops: list[Op] = []
        self._avals: list[Any] = []
        (mapped,) = closed.jaxpr.eqns
        values = {var: Constant(x) for var, x in zip(closed.jaxpr.constvars, closed.consts)}
        self.inputs = [self._new(var.aval) for var in closed.jaxpr.invars]
        values |= dict(zip(closed.jaxpr.invars, self.inputs))
        args = [_read(atom, values) for atom in mapped.invars]
        found = map(self._named, self._flatten(mapped.params["jaxpr"], (), args))
        values |= dict(zip(mapped.outvars, found))
        self.outputs = [values[var] for var in closed.jaxpr.outvars]
        # blocks of the program's own arrays have their worker axis already
        own = (*zip(mapped.outvars, mapped.params["out_specs"]),)
        self._specs = {values[var]: spec for var, spec in own}
        pairs = zip(args, mapped.params["in_specs"])
        self._specs |= {v: spec for v, spec in pairs if not isinstance(v, Constant)}
        self.ops = _alive(self.ops, self.outputs)

    def place(self, value: int, names: tuple[str, ...]) -> tuple[P, bool]:
        """How a value lies over the workers, and whether its block needs a worker axis for it."""
        if value in self._specs:
            return self._specs[value], False
        varies = bool(varying_axes(self._avals[value]))
        return (P(names) if varies else P()), varies

    def size(self, values: Iterable[int]) -> int:
        """Bytes of a worker's values, four to an element."""
        return sum(4 * math.prod(getattr(self._avals[v], "shape", ())) for v in values)

    def _new(self, aval) -> int:
        self._avals.append(aval)
        return len(self._avals) - 1

    def _named(self, value: int | Constant) -> int:
        """The number of an output, which may be a constant."""
        if not isinstance(value, Constant):
            return value
        self.ops.append(Op(lambda _: [value.value], (), (self._new(None),)))
        return self.ops[-1].outputs[0]

    def _flatten(self, jaxpr, consts, args: Sequence) -> list:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(Constant, consts), *args)))
        for eqn in jaxpr.eqns:
            inputs = [_read(atom, values) for atom in eqn.invars]
            if eqn.primitive.name in ("jit", "pjit"):
                inner = eqn.params["jaxpr"]
                outputs = self._flatten(inner.jaxpr, inner.consts, inputs)
            else:
                outputs = [self._new(var.aval) for var in eqn.outvars]
                numbers = tuple(v for v in inputs if not isinstance(v, Constant))
                self.ops.append(Op(_bound(eqn, inputs), numbers, tuple(outputs), eqn))
            values.update(zip(eqn.outvars, outputs))
        return [_read(atom, values) for atom in jaxpr.outvars]


def in_order(ops: list[Op], known: Iterable[int]) -> list[Op]:
    """The operations in an order in which each has its inputs, as near theirs as can be."""
    waiting, order, found = ops, [], {*known}
    while waiting:
        late = []
        for op in waiting:
            if found.issuperset(op.inputs):
                order.append(op)
                found.update(op.outputs)
            else:
                late.append(op)
        waiting = late
    return order


def _alive(ops: list[Op], outputs: Iterable[int]) -> list[Op]:
    wanted, found = set(outputs), []
    for op in reversed(ops):
        if wanted & {*op.outputs} or (op.eqn is not None and op.eqn.effects):
            wanted.update(op.inputs)
            found.append(op)
    return found[::-1]


def communicates(eqn) -> bool:
    """Whether an equation is a collective or has one in it."""
    if named_axes(eqn) and eqn.primitive.name.removesuffix("_start") in OPS:
        return True
    inner: list[Any] = [jaxpr for _, jaxpr in sub_programs(eqn)]
    return any(communicates(one) for jaxpr in inner for one in jaxpr.eqns)


def _bound(eqn, inputs: Sequence) -> Callable[..., Sequence]:
    """The equation as a function of those of its inputs that are no constants."""

    def run(bind, *values):
        left = iter(values)
        return bind(eqn, [v.value if isinstance(v, Constant) else next(left) for v in inputs])

    return run


def _read(atom, values: dict):
    return Constant(atom.val) if hasattr(atom, "val") else values[atom]
