"""What a step sends, and in which order: the same on all workers.

The order is the one for a slow network, where the first large message travels for longer than
everything takes that it does not hold up: first what needs the least computation, then what waits
for no other before what waits for some, small messages before large ones. The parts of a payload
(values, scales, indices) are one message of bytes, and a small sum joins the sum behind it (the
last one, the sum before it): hosts pay more for a meeting than for its bytes.
"""

import itertools

import jax
import jax.numpy as jnp

from jaxcomm.collectives import primitives
from jaxcomm.collectives.flatten import flatten
from jaxcomm.traffic.count import name_scope
from jaxcomm.training._program import Op, Program, in_order

SMALL = 4096  # bytes of a message that need not wait for larger ones
MANY = 64  # collectives
# what carries a payload, and the axes of an operand that say to whom
_CARRIERS = {"all_gather": 0, "all_gather_invariant": 0, "all_to_all": 1}


def messages(program: Program) -> tuple[list[Op], list[Op]]:
    """The operations that compute, and those that travel; of very many in the program's order."""
    ops = _payloads_joined(program)
    travelling = [op for op in ops if op.travels]
    sent = {v for op in travelling for v in op.outputs}
    if len(travelling) <= MANY:
        travelling = _sums_joined(program, ops, _ordered(program, ops))
    return [op for op in ops if not sent & {*op.outputs}], travelling


def _payloads_joined(program: Program) -> list[Op]:
    """The operations, the parts of each payload joined into one message.

    Those are the library's collectives of one kind, one after the other in the program, each with
    a name of its own, none of which depends on another.
    """
    ops, source = program.ops, _source(program.ops)
    runs: list[list[int]] = []
    for i in (i for i, op in enumerate(ops) if op.travels):
        run = runs[-1] if runs else []
        same = run and _of_one_payload([ops[j] for j in run], ops[i])
        if same and not _needs(i, ops, source) & {*run}:
            run.append(i)
        else:
            runs.append([i])
    runs = [run for run in runs if len(run) > 1]
    joined = {run[-1]: _in_bytes([ops[i] for i in run]) for run in runs}
    gone = {i for run in runs for i in run[:-1]}
    found = [joined.get(i, op) for i, op in enumerate(ops) if i not in gone]
    return in_order(found, program.inputs) if joined else ops


def _of_one_payload(run: list[Op], op: Op) -> bool:
    kind = lambda op: (op.eqn.primitive.name, op.eqn.params, len(op.inputs))
    part = lambda op: name_scope(op.eqn, primitives.SCOPE)
    if op.eqn.primitive.name not in _CARRIERS or kind(op) != kind(run[0]) or not op.inputs:
        return False
    return part(op) is not None and part(op) not in map(part, run)


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


def _ordered(program: Program, ops: list[Op]) -> list[Op]:
    source = _source(ops)
    waiting = {i: _needs(i, ops, source) for i, op in enumerate(ops) if op.travels}
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


def _sums_joined(program: Program, ops: list[Op], order: list[Op]) -> list[Op]:
    """The collectives, each small sum joined with the sum behind it, the last with that before."""
    source, result = _source(ops), list[Op]()
    for op in order:
        small = result[-1] if result else op
        needed = _needs(source[op.outputs[0]], ops, source)
        depends = any(source[v] in needed for v in small.outputs)
        either = [small, op] if op is order[-1] else [small]
        light = min(program.size(x.inputs) for x in either) <= SMALL
        if depends or not light or not _sums_alike(small, op):
            result.append(op)
            continue

        def run(bind, *values, first=small):
            vector, unflatten = flatten(values)
            return unflatten(first.run(bind, vector)[0])

        values = (*small.inputs, *op.inputs), (*small.outputs, *op.outputs)
        result[-1] = Op(run, *values, op.eqn)
    return result


def _sums_alike(a: Op, b: Op) -> bool:
    """Whether two different operations are sums of one float32 array over the same axes."""
    dtypes = lambda op: [var.aval.dtype for var in op.eqn.invars]
    kind = lambda op: (op.eqn.primitive.name, op.eqn.params, dtypes(op))
    same = a is not b and kind(a) == kind(b)
    return same and "psum" in a.eqn.primitive.name and dtypes(a) == ["float32"]


def _source(ops: list[Op]) -> dict[int, int]:
    """For every value the number of the operation that gives it."""
    return {value: i for i, op in enumerate(ops) for value in op.outputs}


def _needs(i: int, ops: list[Op], source: dict[int, int]) -> set[int]:
    """The operations that this one depends on."""
    found, todo = set[int](), [i]
    while todo:
        new = {source[v] for v in ops[todo.pop()].inputs if v in source} - found
        found |= new
        todo += new
    return found
