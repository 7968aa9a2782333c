"""A step whose collectives travel beside its computation: programs of their own, two threads.

XLA on CPU runs the collectives and the computation of one program one after the other. Here the
step comes apart (`jaxcomm.training._pieces`), and each piece is a program of its own, dispatched by
two threads, one for the collectives and one for everything else:

    computing   backward 1 | backward 2 | backward 3 | apply 1 | apply 2 | ...
    wire                     sum 1                   | sum 2             | sum 3

The values are those of the one program, but for what XLA rounds otherwise in other fusions. It is
for processes of one CPU device each; with several in one process programs in flight could block
each other, and the pieces run one after the other. On accelerators XLA overlaps in one program.
"""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxcomm.collectives import axis
from jaxcomm.traffic.alone import stand_in
from jaxcomm.traffic.evaluate import bind, outputs
from jaxcomm.training import _between_hosts
from jaxcomm.training._pieces import in_one, take_apart
from jaxcomm.training._program import Piece, Program
from jaxcomm.training.step import TrainState, TrainStep, apart
from jaxcomm.training.workers import Workers


class JoinedStep(TrainStep):
    """A TrainStep whose small sums travel with others: between processes each meeting costs."""

    _cut = staticmethod(in_one)

    def _compile(self, state: TrainState):
        """As of a TrainStep, compiled for each shape."""
        runs: dict[tuple, tuple[Pieces, Any]] = {}

        def run(sync_state, rest: TrainState, batch):
            args = (rest._replace(sync_state=sync_state), batch)
            leaves, treedef = jax.tree.flatten(args)
            kind = (treedef, *((x.shape, x.dtype) for x in map(_array, leaves)))
            if kind not in runs:
                jaxpr, out = self._traced(*args)
                runs[kind] = Pieces(jaxpr, self.workers, self._cut), jax.tree.structure(out)
            pieces, out = runs[kind]
            state, *others = out.unflatten(pieces(leaves))
            return apart(state), *others

        return run


class OverlappedStep(JoinedStep):
    """A TrainStep in pieces; see make_train_step(background=)."""

    _cut = staticmethod(take_apart)

    def __init__(self, loss_fn, tx, workers: Workers, sync, donate: bool):
        if workers.mesh is None:
            raise ValueError(
                "background=True needs workers on devices: simulated ones and pmap have no "
                "transfers of their own"
            )
        super().__init__(loss_fn, tx, workers, sync, donate)

    def alone(self, state: TrainState, batch) -> "Pieces":
        """The pieces without communication, as a function of one worker's arrays."""
        return Pieces(self.trace(state, batch), self.workers, self._cut, communicate=False)


class Pieces:
    """A program in pieces, as a function of its arrays.

    Args:
      closed: the program, see `Program`.
      workers: who runs it.
      cut: how it comes apart: `take_apart` or `in_one`.
      communicate: or one worker alone, on its blocks, who imagines n equal ones.
    """

    def __init__(self, closed, workers: Workers, cut: Callable, communicate: bool = True):
        self._program, self._workers = Program(closed), workers
        computing, travelling = cut(self._program)
        compiled = self._jit if communicate else self._jit_alone
        self._computing = [(piece, compiled(piece)) for piece in computing]
        self._travelling = [(piece, compiled(piece)) for piece in travelling]
        pieces = [*computing, *travelling]
        self._uses = Counter([*self._program.outputs, *(v for p in pieces for v in p.inputs)])
        assert workers.mesh is not None
        alone = len(workers.mesh.local_devices) == 1 and workers.platform == "cpu"
        self._wire = ThreadPoolExecutor(1, "jaxcomm-wire") if alone and travelling else None

    def __call__(self, arrays: list) -> list:
        """The outputs; a piece runs as soon as it can, the most urgent one first."""
        if not self._travelling and len(self._computing) == 1:
            return self._computing[0][1](*arrays)
        known, left = dict(zip(self._program.inputs, arrays)), Counter(self._uses)
        todo, queue = list(self._computing), deque(self._travelling)
        flying: deque[tuple[Piece, Future]] = deque()

        def take(piece: Piece) -> list:
            values = [known[v] for v in piece.inputs]
            left.subtract(piece.inputs)
            for v in piece.inputs:
                if not left[v]:
                    del known[v]
            return values

        while todo or queue or flying:
            while queue and known.keys() >= {*queue[0][0].inputs}:
                piece, program = queue.popleft()
                flying.append((piece, self._send(program, take(piece))))
            ready = next((p for p in todo if known.keys() >= {*p[0].inputs}), None)
            if ready is None or (flying and flying[0][1].done()):
                piece, sent = flying.popleft()
                result = sent.result()
            else:
                todo.remove(ready)
                piece, program = ready
                result = _run(program, take(piece))
            known.update(zip(piece.outputs, result))
        return [known[value] for value in self._program.outputs]

    def _send(self, program, values: list) -> Future:
        if self._wire is not None:
            return self._wire.submit(_run, program, values)
        result = Future()
        result.set_result(_run(program, values))
        return result

    def _jit(self, piece: Piece):
        names = self._workers.names
        way = lambda value: self._program.place(value, names)
        hosts = self._workers.on_hosts
        run_equation = partial(outputs, rule=_between_hosts.rule) if hosts else bind

        def run(*args):
            args = [x[0] if way(v)[1] else x for v, x in zip(piece.inputs, args)]
            out = zip(piece.outputs, piece(args, run_equation))
            return [axis.varying(x, names)[None] if way(v)[1] else x for v, x in out]

        return jax.jit(
            jax.shard_map(
                run,
                mesh=self._workers.mesh,
                in_specs=tuple(way(v)[0] for v in piece.inputs),
                out_specs=[way(v)[0] for v in piece.outputs],
                axis_names=set(names),
            )
        )

    def _jit_alone(self, piece: Piece):
        sizes = dict(zip(self._workers.names, self._workers.sizes))
        rule = partial(stand_in, sizes=sizes)
        return jax.jit(lambda *args: piece(args, partial(outputs, rule=rule)))


def _array(x):
    return x if hasattr(x, "dtype") else np.asarray(x)


def _run(program, values: list) -> list:
    return jax.block_until_ready(program(*values))
