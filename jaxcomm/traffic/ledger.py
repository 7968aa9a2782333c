"""The account of a step: its collectives, and sums over them.

A worker sends, with n workers along the axis and an operand of b bytes:

    all-reduce        2 (n-1)/n b        (ring)
    all-gather        (n-1) b
    all-to-all        (n-1)/n b
    reduce-scatter    (n-1)/n b
    permute           b

Bytes inside a conditional count on the steps that take that branch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxcomm.collectives.left_dense import LeftDense

SHARE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "permute": lambda n: 1 if n > 1 else 0,
}
UNMETERED = "unmetered"  # starts the name of a conditional that the library did not make
UNNAMED = "unnamed"  # part of a collective that the library did not make
PAYLOAD = ("values", "votes", "dense", UNNAMED)  # parts; metrics are neither payload nor metadata
METRICS = "metrics"


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
    exchange: str = ""  # gather, two_phase, ring, hierarchical or dense: what 'auto' chose

    @property
    def operand_bytes(self) -> int:
        """Bytes of the operand, all repetitions together."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize * self.times

    @property
    def sent_bytes(self) -> float:
        """Bytes that one worker sends, all repetitions together."""
        return SHARE[self.op](self.workers) * self.operand_bytes

    @property
    def kind(self) -> str:
        """payload, metadata (scales, indices, seeds) or metrics."""
        if self.part == METRICS:
            return METRICS
        return "payload" if self.part in PAYLOAD else "metadata"


class Traffic(NamedTuple):
    """What a step puts on the wire (`print_traffic` shows it). All bytes are one worker's."""

    collectives: tuple[Collective, ...]
    choices: tuple[str, ...]  # names of the conditionals, in the order of metrics['branches']
    workers: int
    elements: int  # parameters of one replica
    left_dense: tuple[LeftDense, ...] = ()  # what a compressing method sends as it is, and why

    def during(self, branches: Sequence[int] = ()) -> tuple[Collective, ...]:
        """The collectives of a step that took these branches (`metrics['branches']`)."""
        taken = {name: int(b) for name, b in zip(self.choices, branches)}
        runs = lambda c: all(taken.get(name, branch) == branch for name, branch in c.when)
        return tuple(c for c in self.collectives if runs(c))

    def step_bytes(self, branches: Sequence[int] = ()) -> float:
        """Bytes sent in a step that took these branches (`metrics['branches']`)."""
        return _total(self.during(branches))

    @property
    def every_step(self) -> tuple[Collective, ...]:
        """The collectives outside every conditional."""
        return tuple(c for c in self.collectives if not c.when)

    @property
    def sync_only(self) -> tuple[Collective, ...]:
        """The collectives of those steps that meet: inside a conditional."""
        return tuple(c for c in self.collectives if c.when)

    @property
    def every_step_bytes(self) -> float:
        """Bytes sent in every step."""
        return _total(self.every_step)

    @property
    def conditional_bytes(self) -> float:
        """Bytes sent when every conditional takes its dearest branch, beyond every step's."""
        return self.largest_step_bytes - self.every_step_bytes

    @property
    def largest_step_bytes(self) -> float:
        """Bytes of the dearest step, conditionals resolved branch by branch."""
        return _total(extreme(self.collectives, lambda c: c.sent_bytes, max))

    @property
    def smallest_step_bytes(self) -> float:
        """Bytes of the cheapest step."""
        return _total(extreme(self.collectives, lambda c: c.sent_bytes, min))

    def by(self, field: str) -> dict[str, float]:
        """Bytes by 'op', 'axes', 'dtype', 'part' or 'kind', all branches together."""
        totals: dict[str, float] = {}
        for c in self.collectives:
            key = ",".join(c.axes) if field == "axes" else getattr(c, field)
            totals[key] = totals.get(key, 0.0) + c.sent_bytes
        return totals

    @property
    def payload_bytes(self) -> float:
        """Bytes of values, compressed or dense, all branches together."""
        return self.by("kind").get("payload", 0.0)

    @property
    def metadata_bytes(self) -> float:
        """Bytes of scales, indices and seeds, all branches together."""
        return self.by("kind").get("metadata", 0.0)

    @property
    def dense_equivalent_bytes(self) -> float:
        """Bytes that averaging all parameters in float32 once would send."""
        return SHARE["all-reduce"](self.workers) * 4 * self.elements

    def without_compression(self) -> "Traffic":
        """The dense method: all parameters averaged in float32 in every step."""
        axes = tuple(dict.fromkeys(name for c in self.collectives for name in c.axes))
        shape, n = (self.elements,), self.workers
        dense = Collective("all-reduce", axes, n, "float32", shape, "values", 1, ())
        metrics = tuple(c for c in self.every_step if c.kind == METRICS)
        return Traffic((dense, *metrics), (), self.workers, self.elements)


def _total(collectives: Iterable[Collective]) -> float:
    return sum(c.sent_bytes for c in collectives)


def extreme(
    collectives: Sequence[Collective], cost: Callable[[Collective], float], choose: Callable
) -> tuple[Collective, ...]:
    """The collectives of the dearest (choose=max) or cheapest (min) step by this cost."""
    return tuple(_extreme(list(collectives), cost, choose, 0))


def _extreme(collectives, cost, choose, depth: int) -> Iterator[Collective]:
    """Those at this depth, and of each conditional inside the branch that is chosen."""
    yield from (c for c in collectives if len(c.when) == depth)
    inner = [c for c in collectives if len(c.when) > depth]
    for name in dict.fromkeys(c.when[depth][0] for c in inner):
        mine = [c for c in inner if c.when[depth][0] == name]
        branches = {0, 1} | {c.when[depth][1] for c in mine}  # one of them may send nothing
        runs = [
            list(_extreme([c for c in mine if c.when[depth][1] == b], cost, choose, depth + 1))
            for b in sorted(branches)
        ]
        yield from choose(runs, key=lambda run: sum(map(cost, run)))
