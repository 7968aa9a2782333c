"""A step that goes on with the processes that are left when some die: `on_failure=continue`.

Each step runs inside `jax.experimental.multihost_utils.live_devices`, which tells all survivors of
a death at the same step. They then build the step anew for the devices that live, put back the
last state of their own (a copy in host memory, taken every few steps), repeat the steps since then
with the same rows and go on:

  replicated leaves        as every survivor has them
  per-worker leaves        the dead's are dropped, the survivors keep theirs: error memories, local
                           momenta and parameters of the living
  EF21's g_i               g, what all had agreed on, so that g is again the mean of the living g_i
  leaves cut by position   (the second error memory of a two-phase mean) start again from zero
  the batch                the rows of the dead are not trained on

All means are over the living from then on. Whatever else needs all processes (comparisons, the one
tree to evaluate, what a checkpoint gathers) goes through `together`, which survives in the same
way. gloo cannot abort: a process whose collective has failed hangs up the connections that were
opened in it, or since the ElasticStep was made, so that its neighbours' collectives fail as well.
Checkpoints are written by process 0 alone (`Checkpointer(writers="first")`). Needs
`jax_enable_recoverability` before the job is joined (`prepare`). Process 0 hosts the coordination
service: at its death JAX aborts the others (SIGABRT), which is for a restart. No process can join
later. One that is stuck or cut off is left once the watchdog has had no sign of life for its
`silence`, and counts as dead where its heartbeats have stopped for HEARTBEAT_SECONDS; without a
watchdog all wait for it.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from jaxcomm.training import _storage
from jaxcomm.training._sockets import Connections
from jaxcomm.training.distributed import client, connect
from jaxcomm.training.placement import CHUNKS
from jaxcomm.training.step import TrainState, TrainStep
from jaxcomm.training.watchdog import Watchdog
from jaxcomm.training.workers import Place
from jaxcomm.transforms._ef21 import EF21State

HEARTBEAT_SECONDS = 10  # without one for so long a process is dead
STOPS = "jaxcomm/stops/"  # who asked for a stop, and before the end of which call


class Snapshot(NamedTuple):
    """This process's part of a state in host memory: a replicated leaf, or its workers' rows."""

    leaves: dict[str, np.ndarray]  # by path; keys as their data
    kinds: dict[str, Place]  # by path
    view: Any  # a TrainState: what one worker sees of it, abstract
    step: int


def prepare() -> dict[str, Any]:
    """Lets processes outlive others; call it before `initialize`, and pass on what it returns."""
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it would wait for the dead
    return {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": 15}


class ElasticStep:
    """A TrainStep for as many devices as live; has all that a TrainStep has.

    Args:
      make: `make(devices)`: the step for these devices, which it uses in this order.
      devices: those at the start, of all processes.
      every: steps between two copies of the state to host memory; so many are repeated at most.
      watchdog: says who is silent, and is told whom it need not watch any more.
      connections: between the devices, if they were opened before.

    Raises:
      ValueError: `every` is less than 1.
    """

    def __init__(
        self,
        make: Callable[[list[Any]], TrainStep],
        devices: list[Any],
        *,
        every: int = 1,
        watchdog: Watchdog | None = None,
        connections: Connections | None = None,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.lost: tuple[int, ...] = ()  # processes that died
        self.recovery_seconds = 0.0  # from the last death that was seen to the next step's end
        self._make, self._all, self._every, self._watchdog = make, devices, every, watchdog
        self._live = list(devices)
        self._step = make(self._live)
        self._snapshot: Snapshot | None = None
        self._connections = connections or Connections()
        self._rows: list[Any] = []  # this process's, of the steps since the snapshot
        self._calls, self._asked = 0, False
        if watchdog is not None:  # a collective with a silent process does not fail by itself
            watchdog.leave_silent(self._connections.hang_up, 2.0 * HEARTBEAT_SECONDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
        """One step of the living workers; `lost_workers` in the metrics says how many do not."""
        if self._snapshot is None:
            self._snapshot = take(state, self._step.places)
        self._calls += 1
        if self._asked:
            self._asked = False
            client().key_value_set(f"{STOPS}{jax.process_index()}", str(self._calls))
        first, rows = self._step, jax.tree.map(_storage.own_rows, batch)
        again = lambda: batch if self._step is first else self._global(rows)
        state, metrics = self._survive(lambda state: self._step(state, again()), state)[1]
        self._rows.append(rows)
        if len(self._rows) >= self._every:
            self._snapshot, self._rows = take(state, self._step.places), []
        return state, {**metrics, "lost_workers": len(self._all) - len(self._live)}

    def ask_to_stop(self) -> None:
        """From now on, or one step later, `stopping` is true everywhere; for a signal handler."""
        self._asked = True

    def stopping(self) -> bool:
        """Whether somebody asked for a stop before the last step; all that live say the same."""
        asked = client().key_value_dir_get(STOPS)  # some may be of a step that is still to come
        return any(int(call) <= self._calls for _, call in asked)

    def together(
        self, fn: Callable[[TrainState], Any], state: TrainState
    ) -> tuple[TrainState, Any]:
        """`(state, fn(state))`; after a death once more, with the survivors' state.

        Args:
          fn: what all processes do together; it does not donate the state.
          state: after the last step.
        """
        if self._snapshot is None:
            self._snapshot = take(state, self._step.places)
        return self._survive(fn, state)

    def _survive(self, run: Callable[[TrainState], Any], state: Any) -> tuple[TrainState, Any]:
        begin = None
        while True:
            try:
                with multihost_utils.live_devices(self._all) as living:
                    if len(living) < len(self._live):
                        begin = begin or time.monotonic()
                        state = self._rebuild(living)
                    with self._calling():
                        result = jax.block_until_ready(run(state))
            except multihost_utils.ProcessFailureError as error:
                begin = begin or time.monotonic()
                logging.warning("%s", str(error).splitlines()[0])
                continue
            if begin is not None:
                self.recovery_seconds = time.monotonic() - begin
                logging.warning("going on after %.1f s", self.recovery_seconds)
            return state, result

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """A failed collective is failed for those, too, who wait for this process in it."""
        with self._connections.watching():
            try:
                yield
            except jax.errors.JaxRuntimeError:
                self._connections.hang_up()
                raise

    def leave(self, code: int) -> None:
        """Ends this process: JAX's own end waits for the dead, or for nobody if none has died."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):  # somebody may have died just now
            with multihost_utils.live_devices(self._all):
                pass
            if jax.process_index() == 0:  # its service must outlive the others' last call
                time.sleep(1.0)
        os._exit(code)

    def _rebuild(self, living: list[Any]) -> TrainState:
        """The state after the last whole step, for those that are left."""
        assert self._snapshot is not None
        alive = set(living)
        self._live = [device for device in self._all if device in alive]
        gone = {d.process_index for d in self._all} - {d.process_index for d in alive}
        for rank in gone - set(self.lost):
            if self._watchdog is not None:
                self._watchdog.forget(rank)
        self.lost = tuple(sorted(gone))
        with self._calling():  # while all are in step: one of them may compile for longer
            connect(self._live)
        self._step = self._make(self._live)
        logging.warning(
            "lost processes %s: going on with %d of %d workers from step %d, %d steps again",
            ", ".join(map(str, self.lost)),
            len(self._live),
            len(self._all),
            self._snapshot.step,
            len(self._rows),
        )
        state, fresh = put_back(self._snapshot, self._step)
        if fresh:
            logging.warning("starting again from zero: %s", ", ".join(fresh))
        with self._calling():
            for rows in self._rows:
                state, _ = jax.block_until_ready(self._step(state, self._global(rows)))
        return state

    def _global(self, rows):
        sharding = self._step.workers.sharding(Place.SPLIT)
        assert sharding is not None
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def take(state: TrainState, places: Any) -> Snapshot:
    """A copy of this process's part of a state; the state may be donated afterwards."""
    kinds, specs, leaves = _storage.flatten(places), {}, {}
    for path, leaf in _storage.flatten(state).items():
        apart = kinds[path] is Place.PER_WORKER
        specs[path] = jax.ShapeDtypeStruct(leaf.shape[apart:], leaf.dtype)
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        leaves[path] = _storage.own_rows(data)
    views = jax.tree.unflatten(jax.tree.structure(state), list(specs.values()))
    return Snapshot(leaves, kinds, views, int(leaves[".step"]))


def put_back(snapshot: Snapshot, step: TrainStep) -> tuple[TrainState, list[str]]:
    """A state for a step of fewer devices, and the leaves that start again from zero.

    Raises:
      ValueError: the step's state has other leaves, or some of a shape for which there is no rule.
    """
    like = step.abstract_state(snapshot.view.params, snapshot.view.key)
    kinds, specs = _storage.flatten(step.places), _storage.flatten(like)
    if kinds != snapshot.kinds:
        raise ValueError("with fewer workers the state has other leaves: it cannot go on")
    leaves, fresh = [], []
    for path, spec in specs.items():
        value, apart = snapshot.leaves[path], kinds[path] is Place.PER_WORKER
        shape = _storage.data_spec(spec).shape
        if apart and path.endswith(CHUNKS):  # of other positions now, even if as long
            value = np.zeros((len(value), *shape[1:]), value.dtype)
            fresh.append(path)
        elif value.shape[apart:] != shape[apart:]:
            raise ValueError(f"state leaf {path} depends on the number of workers: it cannot go on")
        sharding = step.workers.sharding(kinds[path])
        assert sharding is not None
        array = jax.make_array_from_process_local_data(sharding, value, shape)
        leaves.append(jax.random.wrap_key_data(array) if _is_key(spec) else array)
    state = jax.tree.unflatten(jax.tree.structure(snapshot.view), leaves)
    state = state._replace(layout=step.layout)
    return jax.tree.map(_agreed, state, is_leaf=_is_ef21), fresh


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_ef21(node: Any) -> bool:
    return isinstance(node, EF21State)


def _agreed(node: Any) -> Any:
    """EF21 with g_i = g; anything else as it is."""
    if not _is_ef21(node):
        return node

    def spread(mean, local):
        row = np.asarray(mean.addressable_data(0))
        rows = np.broadcast_to(row, (len(local.addressable_shards), *row.shape))
        return jax.make_array_from_process_local_data(local.sharding, rows, local.shape)

    return node._replace(local=jax.tree.map(spread, node.mean, node.local))
