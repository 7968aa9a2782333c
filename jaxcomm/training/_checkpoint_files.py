"""The files of a directory of checkpoints: names, the marker that completes one, what may go.

``<step>`` holds one checkpoint, ``<step>-1`` a later attempt at the same step: nothing is ever
written over what is there. The marker ``jaxcomm.json`` is written last and deleted first.
"""

import json
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxcomm.training._storage import crc32

MARKER = "jaxcomm.json"
OWN_FILE = "state.msgpack"
_WRITTEN = (OWN_FILE, "_CHECKPOINT_METADATA")  # one of them is in every directory that was written


class CheckpointFiles:
    """What is in a directory of checkpoints. Changes are made by process 0 only."""

    def __init__(self, directory: Path):
        self._dir = directory

    def found(self) -> dict[int, Path]:
        """The complete checkpoints by ascending step; of each step the latest attempt."""
        return {step: path for step, _, path in self._dirs() if (path / MARKER).exists()}

    def free_name(self, step: int) -> str:
        """A directory name for a new checkpoint of this step."""
        attempts = [attempt for s, attempt, _ in self._numbered() if s == step]
        return f"{step}-{max(attempts) + 1}" if attempts else str(step)

    def set_aside(self, restored: int | None) -> None:
        """Renames the checkpoints after the restored step: they are not this run's past."""
        for step, _, path in self._dirs():
            if restored is not None and step > restored and (path / MARKER).exists():
                aside = path.with_name(f"{path.name}.set-aside-{time.time_ns()}")
                logging.warning("this run restarted before %s: renamed to %s", path, aside.name)
                path.rename(aside)

    def prune(self, keep: int) -> None:
        """Deletes all but the latest checkpoints, and what interrupted saves left behind.

        Nothing of a later step: another run may be writing it.
        """
        dirs = self._dirs()
        complete = [(step, path) for step, _, path in dirs if (path / MARKER).exists()]
        kept = list(dict(complete).items())[-keep:]
        if not kept:
            return
        newest = kept[-1][0]
        for step, _, path in dirs:
            whole = (step, path) in complete
            if step <= newest and (step, path) not in kept and (whole or _is_ours(path)):
                (path / MARKER).unlink(missing_ok=True)  # first: no half-deleted checkpoint
                shutil.rmtree(path, ignore_errors=True)
        for path in self._dir.glob("*.orbax-checkpoint-tmp*"):
            number = re.match(r"\d+", path.name)
            if number is None or int(number[0]) <= newest:
                shutil.rmtree(path, ignore_errors=True)

    def _dirs(self) -> list[tuple[int, int, Path]]:
        """(step, attempt, path) of all that may be a checkpoint."""
        return [entry for entry in self._numbered() if entry[2].is_dir()]

    def _numbered(self) -> list[tuple[int, int, Path]]:
        """(step, attempt, path) of all that is named like a checkpoint, files too."""
        matches = [(re.fullmatch(r"(\d+)(?:-(\d+))?", p.name), p) for p in self._dir.iterdir()]
        return sorted((int(m[1]), int(m[2] or 0), path) for m, path in matches if m)


def _is_ours(path: Path) -> bool:
    """Whether a directory without a marker is of a save: empty, or with what all of them write."""
    return any((path / name).exists() for name in _WRITTEN) or not any(path.glob("*"))


def write_marker(path: Path, meta: dict[str, Any]) -> None:
    """Makes a directory a checkpoint: `meta` and a checksum of every file, atomically."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    meta = {**meta, "files": {file.relative_to(path).as_posix(): crc32(file) for file in files}}
    marker = {"crc32": _checksum(meta), "meta": meta}
    temporary = path / f"{MARKER}.tmp"
    temporary.write_text(json.dumps(marker), encoding="utf-8")
    temporary.replace(path / MARKER)


def read_marker(path: Path, shared: bool = True) -> tuple[dict[str, Any], str | None]:
    """(meta, what is damaged or None); the processes may share the reading of the files."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        meta = marker["meta"]
        if marker["crc32"] != _checksum(meta):
            return {}, f"{MARKER} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError):
        return {}, f"{MARKER} cannot be read"
    rank, count = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    for name, crc in list(meta["files"].items())[rank::count]:
        try:
            if crc32(path / name) != crc:
                return meta, f"{name} does not match its checksum"
        except OSError:
            return meta, f"{name} cannot be read"
    return meta, None


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta).encode())
