"""A step's program taken apart into pieces: what travels, and what is computed in between.

Each message is a piece of its own, and they travel in one order (`jaxcomm.training._messages`).
With it every other operation has two numbers: `after`, the last message that it depends on, and
`due`, the first one that depends on it. Operations of the same two numbers are one piece: it can
run as soon as message `after` has arrived, and should have when `due` is to leave. What no message
waits for runs with the first operation that uses it. So the gradients of the last layers, which a
backward pass finds first, are on their way while it goes on, and what has arrived is applied while
the rest travels.
"""

from jaxcomm.training._messages import messages
from jaxcomm.training._program import Op, Piece, Program, in_order

NEVER = 1 << 30  # the number of a message that does not exist
# they give as many bytes as they take, or more: done again in every piece that wants them
_FREE = {"broadcast_in_dim", "expand_dims", "pcast", "pvary", "reshape", "squeeze"}


def in_one(program: Program) -> tuple[list[Piece], list[Piece]]:
    """The whole program as one piece, of as few messages as can be."""
    computing, travelling = messages(program)
    order = in_order([*computing, *travelling], program.inputs)
    return [Piece(tuple(order), tuple(program.inputs), tuple(program.outputs))], []


def take_apart(program: Program) -> tuple[list[Piece], list[Piece]]:
    """The pieces that compute, the most urgent first, and those that travel, in their order."""
    computing, travelling = messages(program)
    kept = set(program.outputs)
    free = {v: op for op in computing if _free(op) and not kept & {*op.outputs} for v in op.outputs}

    after = {v: i for i, op in enumerate(travelling) for v in op.outputs}
    for op in computing:
        latest = max((after.get(v, -1) for v in op.inputs), default=-1)
        after |= dict.fromkeys(op.outputs, latest)
    due = {v: i for i, op in reversed([*enumerate(travelling)]) for v in op.inputs}
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
    pieces = _cut([*urgent, *([op] for op in travelling)], free, kept)
    return pieces[: len(urgent)], pieces[len(urgent) :]


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


def _free(op: Op) -> bool:
    if op.eqn is None or op.eqn.effects:
        return False
    return op.eqn.primitive.name in _FREE or not op.inputs
