r"""The flags by which a binary joins a job of several processes.

    python -m experiments.train --config=FILE \
        --coordinator=10.0.0.1:7777 --processes=4 --process_id=0

Without them the environment decides (`experiments.cluster` sets it), or what JAX detects (SLURM,
Open MPI, Kubernetes, TPU).
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from experiments.config import Config
from jaxcomm.training import _storage, distributed
from jaxcomm.training.watchdog import START_SECONDS, give_up

VARIABLES = {
    "coordinator": distributed.COORDINATOR,
    "processes": distributed.PROCESSES,
    "process_id": distributed.PROCESS_ID,
}
# of one host, its disk, its link, its patience: they may differ between processes
OWN = ("local_checkpoints", "pace", "stuck_seconds", "standstill_seconds")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """--coordinator, --processes and --process_id."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("processes", None, "Processes of the job.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=values)


def export(values: flags.FlagValues = flags.FLAGS) -> None:
    """Puts the flags that were given where `distributed.initialize` and children look for them."""
    for name, variable in VARIABLES.items():
        if (value := getattr(values, name)) is not None:
            os.environ[variable] = str(value)


def count() -> int:
    """Processes of the job, before it is joined; 1 if only JAX's detection will know.

    Raises:
      ValueError: the environment describes half a job, or one that cannot be.
    """
    found = distributed.explicit()
    return found[1] if found else 1


def agree(config: Config) -> None:
    """All processes meet, and go on with the same config but for the fields OWN.

    Who does not come is named in one sentence, and the others end with code 75.

    Raises:
      ValueError: a field has another value in another process.
    """
    shared = {name: value for name, value in config.to_dict().items() if name not in OWN}
    try:
        said = distributed.tell_all(_storage.dumps(shared), START_SECONDS)
    except TimeoutError as error:
        give_up(str(error))
    first, *others = map(_storage.loads, said)
    for rank, other in enumerate(others, start=1):
        for name, here, there in _storage.config_changes(first, other):
            raise ValueError(
                f"config.{name} must be the same in all processes, got "
                f"{here!r} in process 0 and {there!r} in process {rank}"
            )


@contextlib.contextmanager
def claimed(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """This job alone writes in the directory for as long as the block runs; all processes call it.

    Process 0 holds a lock on it, which ends with the process however that ends. Other hosts do not
    see it: a file server keeps the lock of a dead one, and a restart must not wait for that.

    Raises:
      ValueError: another process writes there; the sentence names it.
    """
    refused = ""
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            directory = os.open(workdir, os.O_RDONLY)
            held.callback(os.close, directory)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused = f"{_owner(directory)} is writing to workdir {workdir}"
            except OSError:  # a file system without such locks
                pass
        if refused := distributed.tell_all(refused, START_SECONDS)[0]:
            raise ValueError(f"{refused}: end it, or give another --workdir")
        yield


def _owner(directory: int) -> str:
    """Who holds the lock on an open directory, as far as the kernel says."""
    locks = Path("/proc/locks")
    for line in locks.read_text().splitlines() if locks.exists() else ():
        _, kind, _, _, process, inode, *_ = line.split()
        if kind == "FLOCK" and inode.endswith(f":{os.fstat(directory).st_ino}"):
            return f"process {process}"
    return "another process"


def keep_programs(directory: str | None) -> None:
    """Compiled programs are kept in a directory, however small, so that a restart is quick.

    An environment variable JAX_COMPILATION_CACHE_DIR wins.
    """
    if directory and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
