"""Sending no faster than the link: fewer packets lost where a router's queue is short.

After a silence TCP probes for the bandwidth by sending ever faster, until a queue on the way
overflows; a method that communicates in bursts probes in each of them. Who knows the link (from
`experiments.cluster --probe`) can have the kernel space the packets instead: SO_MAX_PACING_RATE.
"""

import contextlib
import os
import socket
import struct

from jaxcomm.traffic.link import Link
from jaxcomm.training._sockets import descriptors

SO_MAX_PACING_RATE = 47  # <asm-generic/socket.h>; Python has no name for it
UNLIMITED = 2**64 - 1


def pace(link: Link | str | None) -> int:
    """Lets each TCP connection of this process to another host send at the link's rate at most.

    It concerns those that stand when it is called: gloo opens its own at the first collective, so
    call it after a step that communicates, and again after a new one. Linux 4.20 or later.

    Args:
      link: the link, or its bandwidth as `Link.parse` reads it; None takes the limit away.

    Returns:
      How many connections that are.

    Raises:
      ValueError: not a bandwidth.

    Example:
      >>> import jaxcomm
      >>> jaxcomm.pace("100mbit")  # a process on its own
      0
    """
    link = link if link is None or isinstance(link, Link) else Link.parse(link)
    rate = UNLIMITED if link is None else max(1, int(link.bandwidth / 8))
    count = 0
    for descriptor in descriptors():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
            if _leaves_the_host(end):
                end.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", rate))
                count += 1
    return count


def _leaves_the_host(end: socket.socket) -> bool:
    """Whether it is a TCP connection to elsewhere."""
    if end.type != socket.SOCK_STREAM or end.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return end.getpeername()[0] != end.getsockname()[0]
