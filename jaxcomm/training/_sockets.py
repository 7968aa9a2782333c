"""This process's sockets; those that were opened while somebody watched can be hung up.

gloo has no way to abort: a process whose neighbour in a ring has left the collective waits for it,
since the connection between the two still stands. Whoever leaves early must hang up.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_FDS = Path("/proc/self/fd")  # elsewhere than on Linux nothing is seen, nor hung up


class Connections:
    """Sockets of this process that were opened inside `watching()`, or before its first end."""

    def __init__(self):
        self._seen: set[str] = set()
        self._before: set[str] | None = set(_sockets())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Remembers what is opened inside, by whatever thread."""
        before = set(_sockets()) if self._before is None else self._before
        self._before = before
        try:
            yield
        finally:
            self._seen |= set(_sockets()) - before
            self._before = None

    def hang_up(self) -> int:
        """Ends those that are still open, for both sides; returns how many. From any thread."""
        ended, sockets = 0, _sockets()
        seen = set(self._seen)
        if (before := self._before) is not None:  # another thread is inside `watching()`
            seen |= set(sockets) - before
        for name, descriptor in sockets.items():
            if name in seen:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
                    end.shutdown(socket.SHUT_RDWR)
                    ended += 1
        self._seen.clear()
        return ended


def descriptors() -> list[int]:
    """Of all open sockets."""
    return list(_sockets().values())


def _sockets() -> dict[str, int]:
    """Descriptors of the open sockets by name, such as 'socket:[4711]'."""
    found = {}
    for entry in os.listdir(_FDS) if _FDS.exists() else ():
        with contextlib.suppress(OSError):  # it may be closed by now
            name = os.readlink(_FDS / entry)
            if name.startswith("socket:"):
                found[name] = int(entry)
    return found
