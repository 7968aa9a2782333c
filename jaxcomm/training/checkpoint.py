"""Checkpoints of a training run: the one module that knows Orbax (and Flax's serialization).

A checkpoint is a directory ``DIRECTORY/<step>`` in which Orbax (v1 API) stores every array of the
state, per-worker leaves by shard, and in which ``jaxcomm.json`` is written last: data position,
configuration, number of workers, the tree's layout and a CRC-32 of every file. A directory without
that file is no checkpoint, so a save that is cut short leaves the ones before it as they were, and
a damaged file is found before anything of it is used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import json
import logging as std_logging
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax
from absl import logging
from flax import serialization
from orbax.checkpoint import v1 as ocp

from jaxcomm.training import _storage
from jaxcomm.training._checkpoint_files import OWN_FILE, CheckpointFiles, read_marker, write_marker
from jaxcomm.training.resize import layout_of, resized, with_workers
from jaxcomm.training.workers import Place

_FORMAT = 1
WRITERS = ("all", "first", "own")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or used; the message is one sentence."""


class StorageError(CheckpointError):
    """The system could not write or read a checkpoint; another attempt may go well."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


class Checkpointer:
    """Saves and restores the state of a run, bit for bit.

    A save copies the state to the host and returns; files are written by background threads while
    training goes on (one save at a time: the next one waits for it). Under ``jax.distributed``
    every process calls every method; the directory is then on a file system that all share.

    Who writes (`writers`) decides who has to wait for whom:

    - ``"all"``: every process writes its own shards; all of them must live until it is complete.
    - ``"first"``: what workers hold is gathered inside ``save``, process 0 writes all of it. Who
      dies after that does no harm, the others go on, and the checkpoint is one of as many workers
      as there were. It costs the traffic, and memory for all workers' state on every process.
    - ``"own"``: every process has a directory of its own, on a disk of its own perhaps, and saves
      and restores what it is given; nobody waits for anybody (see ``LocalCheckpointer``).

    Args:
      directory: where the checkpoints are; made if it does not exist.
      config: nested dict of JSON values that must be the same when a run continues; leave out what
        may change (number of steps, log interval). ``None`` compares nothing.
      workers: number of workers, which must be the same when a run continues.
      keep: how many checkpoints to keep, the latest ones, at least 1.
      async_save: False makes ``save`` return only when the checkpoint is complete.
      writers: "all", "first" or "own"; with one process they are the same.

    Raises:
      ValueError: `keep` or `writers` is none of these.
      CheckpointError: the directory cannot be made or written.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> with Checkpointer(tempfile.mkdtemp(), config={"seed": 0}, workers=1) as checkpointer:
      ...     saved = checkpointer.save(3, {"w": jnp.arange(2.0)}, data_state={"index": 12})
      ...     state, data_state, extra = checkpointer.restore({"w": jnp.zeros(2)})
      >>> print(state["w"], data_state)
      [0. 1.] {'index': 12}
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: dict[str, Any] | None = None,
        workers: int | None = None,
        keep: int = 3,
        async_save: bool = True,
        writers: str = "all",
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if writers not in WRITERS:
            raise ValueError(f"writers must be one of {', '.join(WRITERS)}, got {writers!r}")
        rank = jax.process_index()
        self._writers, self._main = writers, writers == "own" or rank == 0
        self._from_all = _storage.from_this if writers == "own" else _storage.from_all
        self._dir = _writable(directory)
        self._files = CheckpointFiles(self._dir)
        self._config = None if config is None else json.loads(_storage.dumps(config))
        self._workers, self._keep, self._async = workers, keep, async_save
        self._quiet = _Quiet()
        logging.get_absl_logger().addFilter(self._quiet)
        self._context, self._alone = ocp.Context(), None
        if writers == "first" and jax.process_count() > 1:
            options = {"primary_host": rank, "active_processes": {rank}}
            options["barrier_sync_key_prefix"] = f"jaxcomm_{rank}"
            self._alone = _alone(orbax.options.MultiprocessingOptions(**options))
            for name, value in options.items():  # everybody reads all of it, and waits for nobody
                setattr(self._context.multiprocessing, name, value)
        # The shardings come from the abstract state; one replica of a replicated leaf is written.
        self._context.array.saving.enable_write_sharding_file = False
        self._context.array.saving.use_replica_parallel = False
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "jaxcomm_checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._restored: int | None = None

    def save(
        self, step: int, state: Any, *, data_state: Any, extra: Any = None, force: bool = False
    ) -> bool:
        """Starts saving and returns once the arrays may be donated or changed.

        Args:
          step: the step after which this is the state, at least 0.
          state: any pytree of arrays (typed keys, bfloat16, 4-bit and empty leaves included).
            Leaves that live on one process only are taken from process 0.
          data_state: position in the data, JSON values or bytes; each process's own is kept.
          extra: further JSON values, taken from process 0.
          force: save again even if there is a checkpoint of this step.

        Returns:
          False if there is a checkpoint of this step already and ``force`` is not set.

        Raises:
          ValueError: `step` is no whole number of at least 0.
          StorageError: this or the previous save failed.
          CheckpointError: there is a later checkpoint that this run did not start from.
        """
        step = _whole(step)
        self.wait()
        if self._writers == "first":
            state = _storage.gathered(state)
            if not self._main:
                return True
        plan = self._plan(step, force) if self._main else None
        self._restored = None
        from_all = _storage.from_all if self._writers == "all" else _storage.from_this
        rows = from_all([plan, data_state])
        name, unwritten, later = rows[0][0]
        if unwritten:
            raise StorageError(unwritten)
        if later:
            raise CheckpointError(later)
        if name is None:
            return False
        flat = _storage.flatten(state)
        meta = {
            "format": _FORMAT,
            "jaxcomm": _version(),
            "step": step,
            "workers": _count(state, self._workers),
            "axes": axis_sizes(state),
            "config": self._config,
            "data_state": [position for _, position in rows],
            "extra": json.loads(_storage.dumps(extra)),
            "layout": _storage.layout(flat),
        }
        try:
            written = self._start(self._dir / name, flat)
        except Exception as error:
            raise StorageError(self._unwritten(step, error)) from error
        self._pending = step, self._pool.submit(self._seal, self._dir / name, meta, written)
        if not self._async:
            self.wait()
        return True

    def restore(
        self, state_like: Any, step: int | None = None, *, resize: bool = False
    ) -> tuple[Any, Any, Any]:
        """Reads a checkpoint onto the devices of ``state_like``.

        Without ``step`` the latest one is read; if its files are damaged, the one before, with a
        warning. The checkpoints of later steps are set aside (renamed) by the next ``save``.

        Args:
          state_like: a state, or a tree of ``jax.ShapeDtypeStruct`` with shardings, with the
            structure, shapes and dtypes that were saved; the mesh may be another one.
          step: which one to read.
          resize: a TrainState that was written by another number of workers becomes one of this
            number, by the rules of ``resize_workers``; every process reads all of it.

        Returns:
          ``(state, data_state, extra)``; tuples in the last two come back as lists.

        Raises:
          ValueError: `step` is no whole number of at least 0.
          CheckpointError: there is none, or it is of another configuration, number of workers or
            tree.
          StorageError: it, or the directory, could not be read.
          CorruptCheckpointError: its files (without ``step``: those of all) are damaged.
        """
        step = None if step is None else _whole(step)
        self.wait()
        found = self._agreed()
        if not found:
            raise CheckpointError(f"there is no checkpoint in {self._dir}")
        if step is not None and step not in found:
            held = ", ".join(map(str, found))
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self._dir}, only of {held}"
            )
        for candidate in [step] if step is not None else sorted(found, reverse=True):
            try:
                result = self._read(candidate, self._dir / found[candidate], state_like, resize)
            except CorruptCheckpointError as error:
                if step is not None:
                    raise
                logging.warning("%s; trying the one before it", error)
            else:
                self._restored = candidate
                return result
        held = ", ".join(map(str, found))
        raise CorruptCheckpointError(f"every checkpoint in {self._dir} is corrupt: steps {held}")

    def goes_on_from(self, other: Checkpointer | None) -> None:
        """Makes the next ``save`` set aside all later than what `other` restored; all if None."""
        self._restored = -1 if other is None else other._restored

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; StorageError if they cannot be read."""
        return list(self._agreed())

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint (not of a save in progress), or None."""
        return max(self._agreed(), default=None)

    def wait(self) -> None:
        """Waits for the save in progress; raises StorageError if it failed."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            try:
                future.result()
            except Exception as error:
                raise StorageError(self._unwritten(step, error)) from error

    def close(self) -> None:
        """Waits for the save in progress and ends the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._alone is not None:
                self._alone.close()
            logging.get_absl_logger().removeFilter(self._quiet)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _start(self, path: Path, flat: dict[str, Any]) -> Callable[[], Any]:
        """Copies the arrays to the host; Orbax writes them, and renames the directory, later.

        Returns what waits for that.
        """
        arrays = {key: _storage.pack(leaf) for key, leaf in flat.items() if _stored(leaf)}
        copies = {key: np.array(x) for key, x in arrays.items() if self._writers != "all"}
        if self._writers == "own":
            return functools.partial(_write, path, copies)
        if self._alone is not None:
            saved = orbax.args.PyTreeSave(copies or _NOTHING)
            return functools.partial(self._alone.save, str(path), args=saved)
        with self._context:
            return ocp.save_async(str(path), arrays or _NOTHING).result

    def _seal(self, path: Path, meta: dict[str, Any], written: Callable[[], Any]) -> None:
        """In the background: waits for Orbax, then makes the directory a checkpoint."""
        written()
        if self._main:
            write_marker(path, meta)
            self._files.prune(self._keep)

    def _plan(self, step: int, force: bool) -> tuple[str | None, str, str]:
        """Process 0: (directory name or None for nothing to do, what failed, what forbids)."""
        try:
            self._files.set_aside(self._restored)
            found, name = self._files.found(), self._files.free_name(step)
        except OSError as error:
            return None, self._unwritten(step, error), ""
        if step in found and not force:
            return None, "", ""
        if step < max(found, default=step):
            later = (
                f"{self._dir} holds a checkpoint of step {max(found)}, later than step {step}: "
                "restore from it, remove it or use another directory"
            )
            return None, "", later
        return name, "", ""

    def _agreed(self) -> dict[int, str]:
        """Directory names of the complete checkpoints by step, as process 0 sees them."""
        names, problem = [], None
        try:
            names = [(step, path.name) for step, path in self._files.found().items()]
        except OSError as error:
            problem = f"the checkpoints in {self._dir} could not be read: {_line(error)}"
        names, problem = self._from_all([names, problem])[0]
        if problem:
            raise StorageError(problem)
        return dict(names)

    def _read(self, step: int, path: Path, state_like: Any, resize: bool) -> tuple[Any, Any, Any]:
        where = f"checkpoint of step {step} in {self._dir}"
        meta, problem = read_marker(path, shared=self._writers != "own")
        if problem := next(filter(None, self._from_all(problem)), None):
            raise CorruptCheckpointError(f"{where} is corrupt: {problem}")
        written = _as_written(state_like, meta) if resize else state_like
        flat = _storage.flatten(written)
        problem = self._mismatch(meta, flat, resize)
        if problem := problem or other_axes(meta.get("axes"), written):
            raise CheckpointError(f"{where} {problem}")
        how = _storage.abstract if self._writers == "all" else _storage.on_host
        abstract = {key: how(leaf) for key, leaf in flat.items() if _stored(leaf)}
        try:
            values: Any
            if self._writers == "own":
                values = serialization.msgpack_restore((path / OWN_FILE).read_bytes())
            else:
                with self._context:
                    values = ocp.load(str(path), abstract or _NOTHING)
        except Exception as error:
            raise StorageError(f"{where} could not be read: {_line(error)}") from error
        if written is not state_like:
            state = _resized(values, written, state_like)
        else:
            leaves = [_storage.unpack(values.get(key), leaf) for key, leaf in flat.items()]
            state = jax.tree.unflatten(jax.tree.structure(state_like), leaves)
        data, extra = _storage.loads(json.dumps([meta["data_state"], meta["extra"]]))
        position = data[jax.process_index() if len(data) == jax.process_count() else 0]
        return state, position, extra

    def _mismatch(self, meta: dict[str, Any], flat: dict[str, Any], resize: bool) -> str | None:
        """What forbids using a checkpoint in this run, as half a sentence."""
        if meta["format"] > _FORMAT:
            return f"was written by a newer jaxcomm ({meta['jaxcomm']}, this one is {_version()})"
        ours, theirs = self._workers, meta["workers"]
        if None not in (ours, theirs) and ours != theirs and not resize:
            return (
                f"was written by {theirs} workers, this run has {ours}: restore it with "
                f"resize=True (--config.resize), or with {theirs} workers and use "
                f"resize_workers(state, {ours})"
            )
        problem = None
        if self._config is not None and meta["config"] is not None:
            free = {"workers"} if resize else set()
            configs = [
                {key: value for key, value in config.items() if key not in free}
                for config in (meta["config"], self._config)
            ]
            problem = _storage.config_difference(*configs)
        positions, processes = meta["data_state"], jax.process_count()
        if (
            not problem
            and len(positions) != processes
            and any(p != positions[0] for p in positions)
        ):
            problem = f"holds {len(positions)} data positions, this run has {processes} processes"
        return problem or _storage.layout_difference(meta["layout"], _storage.layout(flat))

    def _unwritten(self, step: int, error: Exception) -> str:
        return f"checkpoint of step {step} could not be written to {self._dir}: {_line(error)}"


def _alone(options: orbax.options.MultiprocessingOptions) -> orbax.Checkpointer:
    """Writes without a word to other processes; Orbax's v1 API compares paths with all of them."""
    handler = orbax.PyTreeCheckpointHandler(multiprocessing_options=options)
    return orbax.Checkpointer(handler, multiprocessing_options=options)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """What one process has, as Flax writes it.

    Orbax counts its operations to name its barriers: one that not all processes take part in would
    leave them waiting for each other at the next.
    """
    path.mkdir()
    (path / OWN_FILE).write_bytes(serialization.msgpack_serialize(arrays))


def _count(state: Any, workers: int | None) -> int | None:
    """Of how many workers a state is."""
    whose = getattr(getattr(state, "layout", None), "workers", None)
    return workers if whose is None else whose.count


_NOTHING = {"": np.zeros(1)}  # Orbax refuses an empty tree


class _Quiet(std_logging.Filter):
    """Drops Orbax's log lines (what it raises is raised here) unless absl logs for debugging."""

    def filter(self, record: std_logging.LogRecord) -> bool:
        return "/orbax/checkpoint/" not in Path(record.pathname).as_posix() or logging.level_debug()


def axis_sizes(state: Any) -> list[int] | None:
    """Of how many workers a state is along each axis, if it says so."""
    whose = getattr(getattr(state, "layout", None), "workers", None)
    return None if whose is None else list(whose.sizes)


def _as_written(state_like: Any, meta: dict[str, Any]) -> Any:
    """The abstract state of the workers that wrote a checkpoint; `state_like` of as many."""
    try:
        ours, n = layout_of(state_like).workers, meta["workers"]
        axes = meta.get("axes")  # older checkpoints have the number only
        if axes is not None and len(axes) == len(ours.sizes):
            n = tuple(axes)
        same = n in (None, ours.count, ours.sizes)
        return state_like if same else with_workers(state_like, n)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def other_axes(theirs: list[int] | None, state: Any) -> str | None:
    """What forbids using the state of as many workers with other axis sizes, as half a sentence."""
    ours = axis_sizes(state)
    if not theirs or not ours or theirs == ours or len(theirs) != len(ours):
        return None
    if Place.PER_WORKER not in jax.tree.leaves(state.layout.places):
        return None
    return (
        f"was written by workers of axis sizes {tuple(theirs)}, this run has {tuple(ours)}: "
        "restore it with resize=True (--config.resize)"
    )


def _resized(values: dict[str, Any], written: Any, state_like: Any) -> Any:
    """What was read whole into host memory, for other workers, on the devices of `state_like`."""
    read = {
        key: values.get(key, np.zeros(_storage.data_spec(leaf).shape))
        for key, leaf in _storage.flatten(written).items()
    }
    stored = jax.tree.unflatten(jax.tree.structure(written), list(read.values()))
    try:
        new = resized(stored, written, state_like)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return jax.tree.map(_storage.unpack, new, state_like)


def _stored(leaf: Any) -> bool:
    return _storage.data_spec(leaf).size > 0


def _writable(directory: str | os.PathLike[str]) -> Path:
    if _storage.is_url(directory):
        raise CheckpointError(f"checkpoints need a mounted file system, got {directory}")
    path = Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write checkpoints to {path}: {reason}") from error
    return path


def _version() -> str:
    try:
        return importlib.metadata.version("jaxcomm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _whole(step: Any) -> int:
    """A step as an int."""
    number = -1
    if not isinstance(step, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(step)
    if number < 0:
        raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
    return number


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
