"""Checkpoints on every host's own disk, beside those on a path that all hosts share.

A process saves what its own devices hold: replicated leaves whole, per-worker leaves its own rows.
Nobody waits for anybody and no network is used. A run goes on from the newest step that every
process still has, or from the shared path if that is newer, a host was replaced, or the number of
workers is another. Local checkpoints of later steps are set aside (renamed) by the next save.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxcomm.training import _storage
from jaxcomm.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    StorageError,
    axis_sizes,
    other_axes,
)


class LocalCheckpointer:
    """Saves to a local directory and, with `shared`, there; used in a `Checkpointer`'s place.

    Args:
      directory: on this host's own disk; `process-<rank>` is made in it.
      shared: saves what all processes have to a path that all see; closed with this one, also if
        that cannot be made. None if there is no such path.
      **options: of the local `Checkpointer`: config, workers, keep.

    Raises:
      CheckpointError: the directory cannot be made or written.
      StorageError: the shared checkpoints cannot be read.
    """

    def __init__(
        self, directory: str | os.PathLike[str], shared: Checkpointer | None, **options: Any
    ):
        path = Path(directory) / f"process-{jax.process_index()}"
        with contextlib.ExitStack() as unless_made:
            if shared is not None:
                unless_made.callback(shared.close)
            self._own, self._shared = Checkpointer(path, writers="own", **options), shared
            unless_made.callback(self._own.close)
            if self.latest() is None:  # what only some processes have is no run's past
                self._own.goes_on_from(None)
            unless_made.pop_all()

    def save(
        self, step: int, state: Any, *, data_state: Any, extra: Any = None, force: bool = False
    ) -> bool:
        """Like `Checkpointer.save`."""
        flat = {path: _storage.pack(leaf) for path, leaf in _storage.flatten(state).items()}
        mine = {path: _storage.own_rows(leaf) for path, leaf in flat.items()}
        noted = {"extra": extra, "shapes": _shapes(state), "axes": axis_sizes(state)}
        saved = self._own.save(step, mine, data_state=data_state, extra=noted, force=force)
        if self._shared is not None:
            self._shared.save(step, state, data_state=data_state, extra=extra, force=force)
        return saved

    def restore(self, state_like: Any, *, resize: bool = False) -> tuple[Any, Any, Any]:
        """Like `Checkpointer.restore`: the newest that all hosts or the shared path have.

        Raises:
          CheckpointError: there is none that fits.
        """
        newest = max(self._steps(), default=0)
        for step in sorted(self._common(), reverse=True):
            if step < newest:
                break
            found, problem = self._read(state_like, step)
            problems = [text for text in _storage.from_all(problem) if text]
            if not problems:
                return found
            logging.warning("local checkpoint of step %d is not used: %s", step, problems[0])
        if self._shared is None:
            raise CheckpointError("no local checkpoint is whole on all processes")
        result = self._shared.restore(state_like, resize=resize)
        self._own.goes_on_from(self._shared)
        return result

    def latest(self) -> int | None:
        """The newest step that all processes, or the shared path, have."""
        return max([*self._common(), *self._steps()], default=None)

    def wait(self) -> None:
        """Waits for the saves in progress; raises CheckpointError if one failed."""
        self._own.wait()
        if self._shared is not None:
            self._shared.wait()

    def close(self) -> None:
        """Waits for the saves in progress and ends the background threads."""
        try:
            self._own.close()
        finally:
            if self._shared is not None:
                self._shared.close()

    def __enter__(self) -> "LocalCheckpointer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _steps(self) -> list[int]:
        """Those on the shared path."""
        return [] if self._shared is None else self._shared.steps()

    def _common(self) -> set[int]:
        """The steps that every process has."""
        try:
            mine = self._own.steps()
        except StorageError as error:  # a disk that was replaced: the others must hear of it
            logging.warning("%s", error)
            mine = []
        return set.intersection(*map(set, _storage.from_all(mine)))

    def _read(self, state_like: Any, step: int) -> tuple[Any, str | None]:
        """This process's part of a step, or what is wrong with it."""
        flat = _storage.flatten(state_like)
        like = {path: _own_like(leaf) for path, leaf in flat.items()}
        try:
            mine, position, noted = self._own.restore(like, step)
        except CheckpointError as error:
            return None, str(error)
        if noted["shapes"] != _shapes(state_like):
            return None, "it is of another number of workers"
        if problem := other_axes(noted.get("axes"), state_like):
            return None, f"it {problem}"
        leaves = [_placed(mine[path], leaf) for path, leaf in flat.items()]
        state = jax.tree.unflatten(jax.tree.structure(state_like), leaves)
        return (state, position, noted["extra"]), None


def _shapes(state: Any) -> dict[str, str]:
    return _storage.layout(_storage.flatten(state))


def _own_like(leaf: Any) -> np.ndarray:
    """An array like `own_rows` of such a leaf."""
    spec = _storage.data_spec(leaf)
    if not _storage.is_split(leaf):
        return np.empty(spec.shape, spec.dtype)
    rows = sum(shard.data.shape[0] for shard in leaf.addressable_shards)
    return np.empty((rows, *spec.shape[1:]), spec.dtype)


def _placed(rows: np.ndarray, leaf: Any) -> Any:
    """What `own_rows` gave as a leaf like `leaf`."""
    if not _storage.is_split(leaf):
        return _storage.unpack(rows, leaf)
    shape = _storage.data_spec(leaf).shape
    array = jax.make_array_from_process_local_data(leaf.sharding, rows, shape)
    return _storage.unpack(array, leaf)
