"""What a method leaves uncompressed, told to whoever is tracing the step for a report."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class LeftDense(NamedTuple):
    """Leaves that a compressing method sends as they are."""

    where: str  # the transform or rule
    leaves: tuple[str, ...]  # such as "['layer']['bias']"
    reason: str


_notes: contextvars.ContextVar[list[LeftDense] | None] = contextvars.ContextVar(
    "left_dense", default=None
)


@contextlib.contextmanager
def record_left_dense() -> Iterator[list[LeftDense]]:
    """Collects what is noted by code traced inside the block."""
    notes: list[LeftDense] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note_left_dense(where: str, leaves: Sequence[str], reason: str) -> None:
    """Says, while an update is traced, that these leaves are not compressed, and why."""
    notes, note = _notes.get(), LeftDense(where, tuple(leaves), reason)
    if notes is not None and leaves and note not in notes:
        notes.append(note)
