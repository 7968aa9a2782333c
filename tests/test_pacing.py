"""Connections to elsewhere are paced; the host's own, and others than TCP's, are not."""

import contextlib
import socket
import struct
import sys

import pytest

from jaxcomm.traffic import Link
from jaxcomm.training.pacing import SO_MAX_PACING_RATE, UNLIMITED, pace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 and pacing are Linux's")


@contextlib.contextmanager
def connection(source: str):
    """Both ends of a TCP connection from this address to 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port), 5, (source, 0)) as here,
            server.accept()[0] as there,
        ):
            yield here, there


def rate(end: socket.socket) -> int:
    return struct.unpack("Q", end.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8))[0]


def test_to_another_host_and_back_to_no_limit():
    with connection("127.0.0.2") as ends, connection("127.0.0.1") as own:
        assert pace("10mbit") == 2
        assert [rate(end) for end in ends] == [1_250_000] * 2
        assert [rate(end) for end in own] == [UNLIMITED] * 2
        assert pace(Link(400e9)) == 2
        assert rate(ends[0]) == 50_000_000_000
        pace(None)
        assert rate(ends[0]) == UNLIMITED


def test_what_is_open_otherwise_is_left_alone(tmp_path):
    pair = socket.socketpair()
    with pair[0], pair[1], socket.create_server(("127.0.0.1", 0)) as server:
        with (tmp_path / "file").open("w"), connection("127.0.0.2"):
            assert pace("1gbit") == 2
        assert rate(server) == UNLIMITED


def test_refused():
    with pytest.raises(ValueError, match="a link is a bandwidth such as 100mbit"):
        pace("fast")
