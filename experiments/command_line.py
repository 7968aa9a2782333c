"""What the user got wrong ends a binary with one sentence on stderr and exit code 2.

That is every error of the operating system, every ValueError that a module of this repository
raised itself, and a config file that is none; where a disk or a network failed, which may pass,
the code is 74. Anything else is a fault of the program and keeps its traceback. Among several
processes all end with that code, and process 0 says the sentence.
"""

import contextlib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags

from experiments.netns import NetworkError
from experiments.processes import MISTAKE, UNSAVED
from jaxcomm.training.checkpoint import StorageError
from jaxcomm.training.distributed import client, rank
from jaxcomm.training.memory import keep_memory

_ROOT = Path(__file__).resolve().parents[1]
_KEY, _WAIT = "jaxcomm/mistake", 10_000  # milliseconds for the others to find the same
# of disks and networks, which may be well again at the next attempt
_PASSING = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
_PASSING |= {
    errno.EADDRINUSE,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}
_OURS = tuple(_ROOT / name for name in ("jaxcomm", "experiments", "configs"))


def run(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run(main)` with errors in one sentence, in a process that keeps its memory."""
    keep_memory()
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, OSError, AttributeError, SyntaxError) as error:
        text = sentence(error)
        if text is None:
            raise
        code = exit_code(error)
        if jax.distributed.is_initialized():
            end_job(text, code)
        _say(text)
        sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """What the flags leave of the arguments; a flag that cannot be is a mistake like any other."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        first, *others = str(error).strip().splitlines()
        if others:  # of a config file, which comes with its traceback
            cause = others[-1].strip().removeprefix("ValueError: ")
            first = f"{first.removesuffix(': Error whilst parsing config file:')}: {cause}"
        _say(first)
        sys.exit(MISTAKE)


def define_counts(
    name: str,
    default: list[int] | None,
    help: str,
    *,
    least: int = 1,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """A flag of whole numbers, comma-separated, each of them at least `least`."""
    commas = flags.ListSerializer(",")
    flags.DEFINE(_Counts(least), name, default, help, flag_values, commas)


class _Counts(flags.ListParser):
    def __init__(self, least: int):
        super().__init__()
        self._least = least

    def parse(self, argument) -> list[int]:
        words = super().parse(argument)
        if words and all(str(word).isdecimal() and int(word) >= self._least for word in words):
            return [int(word) for word in words]
        raise ValueError(f"wants whole numbers, at least {self._least}, comma-separated")


def end_job(text: str, code: int = MISTAKE) -> None:
    """Ends this process of a job; what process 0 found as well it says alone.

    Who found something else says it, too. Process 0 ends last: the others need its service.
    """
    service, first, heard = client(), rank() == 0, ""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has not found it, or is gone
        heard = "" if first else service.blocking_key_value_get(_KEY, _WAIT)
    if heard != text:
        _say(text)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # not all have found it
        if first:
            service.key_value_set(_KEY, text)
        if first or heard:
            service.wait_at_barrier(f"{_KEY}s", _WAIT)
    if first:
        time.sleep(0.2)
    sys.stdout.flush()
    os._exit(code)


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def exit_code(error: Exception) -> int:
    """2 for a mistake, 74 where the next attempt may go well.

    Example:
      >>> exit_code(FileNotFoundError(2, "No such file or directory", "a.bin"))
      2
      >>> exit_code(OSError(116, "Stale file handle", "a.bin"))
      74
    """
    passing = isinstance(error, StorageError) or getattr(error, "errno", None) in _PASSING
    return UNSAVED if passing else MISTAKE


def sentence(error: Exception) -> str | None:
    """The error for the user, or None if it is a fault of the program.

    Example:
      >>> sentence(FileNotFoundError(2, "No such file or directory", "a.bin"))
      "[Errno 2] No such file or directory: 'a.bin'"
      >>> sentence(ValueError("raised where nobody knows"))
    """
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    origin = Path(frames[-1].filename).resolve() if frames else Path()
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}, is no Python: {error.msg}"
    if isinstance(error, AttributeError) and error.name == "get_config":
        file = getattr(error.obj, "__file__", error.obj)
        return f"{file} is no config: it has no function get_config"
    if isinstance(error, AttributeError):  # of a locked ConfigDict, quoted once or twice
        field = re.match(r"\W*(\w+)", str(error))
        if origin.name != "config_dict.py" or not field:
            return None
        meant = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f": did you mean {meant[1]!r}?" if meant else ""
        return f"the config has no field {field[1]!r}{hint}"
    if isinstance(error, OSError | NetworkError):
        return lines[-1].strip() if lines else repr(error)
    ours = any(origin.is_relative_to(package) for package in _OURS)
    return lines[0] if ours and len(lines) == 1 else None
