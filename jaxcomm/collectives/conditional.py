"""`cond` for branches that communicate: types are made to agree, and the choice can be reported.

`lax.cond` wants the same varying type from both branches; here the union is taken. Inside
`record_choices()` every such conditional also tells which branch it took, so that the bytes of a
step can be counted exactly: the predicates are ordinary outputs of the compiled step.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis

SCOPE = "jaxcomm.cond."  # the name scope that carries a conditional's name into the program
APART = "cond: the predicate differs between the workers"


class Choices:
    """Conditionals met while tracing: `names`, int32 `taken` (1 true, 0 false, -1 not reached)."""

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self.names: list[str] = []
        self.taken: list[jax.Array] = []
        self.trace = axis.current_trace()
        self._count = 0

    def next_name(self) -> str:
        self._count += 1
        return f"{self.prefix}{self._count - 1}"


_choices: contextvars.ContextVar[Choices | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def record_choices(choices: Choices | None) -> Iterator[Choices | None]:
    """Records the conditionals traced inside the block into `choices` (None: record nothing)."""
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def cond(pred: jax.Array, true_fn: Callable, false_fn: Callable, *operands):
    """`lax.cond` on a replicated predicate; only the taken branch runs, and communicates.

    Both branches return the same tree of shapes and dtypes; leaves that vary over workers in one
    branch only are typed as varying in both.

    Raises:
      ValueError: the predicate differs between workers (those that take the branch would wait in
        its collective for the others, for ever), or the branches return different trees.
    """
    if differs := axis.varying_axes(pred):
        raise ValueError(
            f"{APART} of axis {', '.join(sorted(differs))}; agree on one first "
            "(collectives.all_max), or choose with jnp.where"
        )
    choices = _choices.get()
    if choices is not None and choices.trace is not axis.current_trace():
        choices = None  # inside somebody else's conditional or loop: nothing may leak out of it
    with record_choices(None):
        types = [jax.eval_shape(fn, *operands) for fn in (true_fn, false_fn)]
    trees = [jax.tree.structure(kind) for kind in types]
    if trees[0] != trees[1]:
        raise ValueError(f"cond: the branches return different trees: {trees[0]} and {trees[1]}")
    name = choices.next_name() if choices is not None else "?"
    names: dict[bool, list[str]] = {}
    if choices is not None:
        for branch, fn in ((True, true_fn), (False, false_fn)):
            names[branch] = _names(fn, operands, f"{name}.{int(branch)}.")

    def run(branch: bool, fn: Callable):
        def body(*args):
            inner = Choices(f"{name}.{int(branch)}.") if choices is not None else None
            with record_choices(inner):
                out = fn(*args)
            for kind in types:
                out = axis.match_varying(out, kind)
            missed = [jnp.int32(-1)] * len(names.get(not branch, ()))
            own = list(inner.taken) if inner is not None else []
            return out, (own + missed if branch else missed + own)

        return body

    with jax.named_scope(SCOPE + name):
        out, taken = jax.lax.cond(pred, run(True, true_fn), run(False, false_fn), *operands)
    if choices is not None:
        choices.names += [name, *names[True], *names[False]]
        choices.taken += [jnp.asarray(pred, jnp.int32), *taken]
    return out


def _names(fn: Callable, operands, prefix: str) -> list[str]:
    found: list[str] = []

    def body(*args):
        inner = Choices(prefix)
        with record_choices(inner):
            out = fn(*args)
        found.extend(inner.names)
        return out

    jax.eval_shape(body, *operands)
    return found
