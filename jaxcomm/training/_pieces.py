"""A step's program taken apart into pieces: what travels, and what is computed in between.

The traced program of one worker is a list of operations. Each collective is a piece of its own, and
they travel in one order, the same on all workers. With it every other operation has two numbers:
`after`, the last collective that it depends on, and `due`, the first one that depends on it.
Operations of the same two numbers are one piece: it can run as soon as collective `after` has
arrived, and should have when `due` is to leave. What no collective waits for runs with the first
operation that uses it. So the gradients of the last layers, which a backward pass finds first, are
on their way while it goes on, and what has arrived is applied while the rest travels.

The order of the collectives is the one for a slow network, where the first large message travels
for longer than everything takes that it does not hold up: first what needs the least computation,
then what waits for no other before what waits for some, small messages before large ones. The parts
of a payload (values, scales, indices) are one message of bytes, and a small sum joins the sum
behind it: hosts pay more for a meeting than for its bytes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcomm.collectives import primitives
from jaxcomm.collectives.axis import varying_axes
from jaxcomm.collectives.flatten import flatten
from jaxcomm.traffic.count import OPS, name_scope, named_axes, sub_programs

SMALL = 4096  # bytes of a message that need not wait for larger ones
MANY = 64  # collectives
NEVER = 1 << 30  # the number of a collective that does not exist
# what carries a payload, and the axes of an operand that say to whom
_CARRIERS = {"all_gather": 0, "all_gather_invariant": 0, "all_to_all": 1, "ppermute": 0}
# they give as many bytes as they take, or more: done again in every piece that wants them
_FREE = {"broadcast_in_dim", "expand_dims", "pcast", "pvary", "reshape", "squeeze"}


class Constant(NamedTuple):
    """A value that the program has in itself."""

    value: Any


class Op(NamedTuple):
    """An operation on numbered values; `run(bind, *values)` gives its outputs."""

    run: Callable[..., Sequence]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    eqn: Any = None


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
    """The operations of a program, on numbered values.

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


def take_apart(program: Program) -> tuple[list[Piece], list[Piece]]:
    """The pieces that compute, the most urgent first, and those that travel, in their order."""
    ops = _messages(program, _alive(program))
    journeys = _journeys(program, ops)
    travelling = {v: i for i, op in enumerate(journeys) for v in op.outputs}
    computing = [op for op in ops if not travelling.keys() & op.outputs]
    kept = set(program.outputs)
    free = {v: op for op in computing if _free(op) and not kept & {*op.outputs} for v in op.outputs}

    after = dict(travelling)
    for op in ops:
        latest = max((after.get(v, -1) for v in op.inputs), default=-1)
        after |= {v: latest for v in op.outputs if v not in travelling}
    due = {v: i for i, op in reversed([*enumerate(journeys)]) for v in op.inputs}
    groups: dict[tuple[int, int], list[Op]] = {}
    users: dict[int, set[int]] = {}  # when those start that nobody waits for
    for op in reversed(computing):
        first = min((due.get(v, NEVER) for v in op.outputs), default=NEVER)
        due |= {v: min(first, due.get(v, NEVER)) for v in op.inputs}
        starts = set[int]().union(*(users.get(v, ()) for v in op.outputs))
        if not free.keys() & op.outputs:
            start = max((after.get(v, -1) for v in op.inputs), default=-1)
            if first == NEVER and not kept & {*op.outputs}:
                start = min(starts, default=start)  # with its user, which need not read it
            groups.setdefault((first, start), []).append(op)
            starts = {start} if first == NEVER else set()
        for v in op.inputs:
            users[v] = users.get(v, set()) | starts
    urgent = [groups[key][::-1] for key in sorted(groups)]
    pieces = _cut([*urgent, *([op] for op in journeys)], free, kept)
    return pieces[: len(urgent)], pieces[len(urgent) :]


def in_one(program: Program) -> tuple[list[Piece], list[Piece]]:
    """The whole program as one piece, its small sums joined with others."""
    ops = _messages(program, _alive(program))
    journeys = _journeys(program, ops)
    sent = {v for op in journeys for v in op.outputs}
    computing = [op for op in ops if not sent & {*op.outputs}]
    order = tuple(_possible(program, [*computing, *journeys]))
    return [Piece(order, tuple(program.inputs), tuple(program.outputs))], []


def _possible(program: Program, ops: list[Op]) -> list[Op]:
    """The operations in an order in which each has its inputs, as near theirs as can be."""
    waiting, order, known = ops, [], {*program.inputs}
    while waiting:
        late = []
        for op in waiting:
            if known.issuperset(op.inputs):
                order.append(op)
                known.update(op.outputs)
            else:
                late.append(op)
        waiting = late
    return order


def _cut(groups: list[list[Op]], free: dict[int, Op], kept: set[int]) -> list[Piece]:
    """Pieces, each with the free operations that lead to it, and what they hand each other."""
    whole = [_with_free(group, free) for group in groups]
    made = [{v for op in group for v in op.outputs} for group in whole]
    wanted = [
        dict.fromkeys(v for op in group for v in op.inputs if v not in own)
        for group, own in zip(whole, made)
    ]
    shared = kept.union(*wanted)
    outputs = [tuple(v for op in group for v in op.outputs if v in shared) for group in groups]
    return [Piece(tuple(g), tuple(w), o) for g, w, o in zip(whole, wanted, outputs)]


def _with_free(group: list[Op], free: dict[int, Op]) -> list[Op]:
    found: dict[int, Op] = {}

    def visit(op: Op) -> None:
        for value in op.inputs:
            if value in free and id(free[value]) not in found:
                visit(free[value])
        found[id(op)] = op

    for op in group:
        visit(op)
    return [*found.values()]


def _messages(program: Program, ops: list[Op]) -> list[Op]:
    """The operations, the parts of each payload joined into one message.

    Those are the library's collectives of one kind, one after the other in the program, each with
    a name of its own, none of which depends on another.
    """
    source = {value: i for i, op in enumerate(ops) for value in op.outputs}
    runs: list[list[int]] = []
    for i in (i for i, op in enumerate(ops) if _travels(op.eqn)):
        run = runs[-1] if runs else []
        same = run and _of_one_payload([ops[j].eqn for j in run], ops[i].eqn)
        if same and not _needs(i, ops, source) & {*run}:
            run.append(i)
        else:
            runs.append([i])
    joined = {run[-1]: _in_bytes([ops[i] for i in run]) for run in runs if len(run) > 1}
    gone = {i for run in runs if len(run) > 1 for i in run[:-1]}
    found = [joined.get(i, op) for i, op in enumerate(ops) if i not in gone]
    return _possible(program, found) if joined else ops


def _of_one_payload(run: list, eqn) -> bool:
    first, part = run[0], name_scope(eqn, primitives.SCOPE)
    if eqn.primitive.name not in _CARRIERS or part is None:
        return False
    same = (first.primitive.name, first.params) == (eqn.primitive.name, eqn.params)
    return same and part not in {name_scope(e, primitives.SCOPE) for e in run}


def _in_bytes(ops: list[Op]) -> Op:
    """Several collectives as one, of their operands' bytes."""
    eqn = ops[0].eqn
    lead = _CARRIERS[eqn.primitive.name]
    results = [op.eqn.outvars[0].aval for op in ops]

    def run(bind, *values):
        sent = [_as_bytes(x, lead) for x in values]
        (found,) = bind(eqn, [jnp.concatenate(sent, axis=-1)])
        ends = [*itertools.accumulate(x.shape[-1] for x in sent)]
        received = jnp.split(found, ends[:-1], axis=-1)
        return [_from_bytes(x, like) for x, like in zip(received, results)]

    inputs = tuple(v for op in ops for v in op.inputs)
    return Op(run, inputs, tuple(v for op in ops for v in op.outputs), eqn)


def _as_bytes(x: jax.Array, lead: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:lead], -1)


def _from_bytes(x: jax.Array, like) -> jax.Array:
    width = (like.dtype.itemsize,) if like.dtype.itemsize > 1 else ()
    return jax.lax.bitcast_convert_type(x.reshape(*like.shape, *width), like.dtype)


def _journeys(program: Program, ops: list[Op]) -> list[Op]:
    """What travels, in its order; of very many collectives that of the program."""
    found = [op for op in ops if _travels(op.eqn)]
    return _joined(program, _ordered(program, ops)) if len(found) <= MANY else found


def _ordered(program: Program, ops: list[Op]) -> list[Op]:
    source = {value: i for i, op in enumerate(ops) for value in op.outputs}
    waiting = {i: _needs(i, ops, source) for i, op in enumerate(ops) if _travels(op.eqn)}
    others = {i: needs & waiting.keys() for i, needs in waiting.items()}
    work = {
        i: (sum(program.size(ops[j].outputs) for j in needs), len(needs))
        for i, needs in waiting.items()
    }
    large = {i: program.size(ops[i].inputs) > SMALL for i in waiting}
    order: dict[int, int] = {}

    def urgency(i: int):
        if not order:
            return (*work[i], i)
        return (max((order[j] for j in others[i]), default=-1), large[i], *work[i], i)

    while len(order) < len(waiting):
        possible = [i for i in waiting if i not in order and others[i] <= order.keys()]
        order[min(possible, key=urgency)] = len(order)
    return [ops[i] for i in order]


def _needs(i: int, ops: list[Op], source: dict[int, int]) -> set[int]:
    """The operations that this one depends on."""
    found, todo = set[int](), [i]
    while todo:
        new = {source[v] for v in ops[todo.pop()].inputs if v in source} - found
        found |= new
        todo += new
    return found


def _joined(program: Program, order: list[Op]) -> list[Op]:
    """The collectives, each small sum joined with the sum behind it."""
    result: list[Op] = []
    for op in order:
        before = result[-1] if result else None
        if before and _can_join(program, before, op):

            def run(bind, *values, first=before):
                vector, unflatten = flatten(values)
                return unflatten(first.run(bind, vector)[0])

            values = (*before.inputs, *op.inputs), (*before.outputs, *op.outputs)
            result[-1] = Op(run, *values, op.eqn)
        else:
            result.append(op)
    return result


def _can_join(program: Program, small: Op, other: Op) -> bool:
    sums = [
        (op.eqn.primitive.name, op.eqn.params, [var.aval.dtype for var in op.eqn.invars])
        for op in (small, other)
    ]
    if "psum" not in sums[0][0] or sums[0] != sums[1] or sums[0][2] != ["float32"]:
        return False
    source = {v: i for i, op in enumerate(program.ops) for v in op.outputs}
    needs = _needs(source[other.outputs[0]], program.ops, source)
    depends = any(source[v] in needs for v in small.outputs)
    return program.size(small.inputs) <= SMALL and not depends


def _alive(program: Program) -> list[Op]:
    """The operations that the outputs depend on, and those with an effect (a print)."""
    wanted, found = set(program.outputs), []
    for op in reversed(program.ops):
        if wanted & {*op.outputs} or (op.eqn is not None and op.eqn.effects):
            wanted.update(op.inputs)
            found.append(op)
    return found[::-1]


def _free(op: Op) -> bool:
    if op.eqn is None or op.eqn.effects:
        return False
    return op.eqn.primitive.name in _FREE or not op.inputs


def _travels(eqn) -> bool:
    """Whether an equation is a collective or has one in it."""
    if eqn is None:
        return False
    if named_axes(eqn) and eqn.primitive.name.removesuffix("_start") in OPS:
        return True
    inner: list[Any] = [jaxpr for _, jaxpr in sub_programs(eqn)]
    return any(_travels(one) for jaxpr in inner for one in jaxpr.eqns)


def _bound(eqn, inputs: Sequence) -> Callable[..., Sequence]:
    """The equation as a function of those of its inputs that are no constants."""

    def run(bind, *values):
        left = iter(values)
        return bind(eqn, [v.value if isinstance(v, Constant) else next(left) for v in inputs])

    return run


def _read(atom, values: dict):
    return Constant(atom.val) if hasattr(atom, "val") else values[atom]
