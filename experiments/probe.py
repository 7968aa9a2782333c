"""Latency and bandwidth of every pair of hosts, by ping-pong over plain sockets.

    python -m experiments.cluster --probe --hosts=4 --rate=100mbit --workdir=DIR
    python -m experiments.plan --links=DIR/probe.json --config=...

Hosts take turns, so that no two transfers share a link. From i to j a few small messages go back
and forth, half of a round trip being the latency; then, of one long message, j measures the time
from its first to its last byte, and the rest of the bytes over it is the bandwidth (i's way of
sending; what a token bucket lets pass at once is not counted). A pair without a connection is
left out, named in the report, and makes the exit code 1. Between different machines start
`python -m experiments.probe` by hand on each, with JAXCOMM_COORDINATOR and its companions set.
"""

import dataclasses
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from experiments import netns
from jaxcomm.traffic.link import ETHERNET, Link
from jaxcomm.training.stragglers import Fault, localise

PINGS, REPEATS = 9, 3
LATENCY = 1e-4  # seconds of a message between namespaces of one machine
SMALL = 64  # bytes of a ping
SECONDS = 0.4  # that a long message should take
FIRST = 1 << 18  # bytes of the first long message, which finds out how long they have to be
LARGEST = 1 << 28
SKIPPED = 1 << 19  # bytes at the beginning: tokens saved up, and TCP's start
WORDS = 16  # bytes of a number on the wire
PORT = 7801  # of a host in a namespace; on loopback host i has a port of its own
CONNECT, ACCEPT = 10.0, 20.0  # seconds; unequal, so that no late connection waits to be accepted
SILENCE = 60.0  # seconds without a byte after which a transfer has failed


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was measured; matrices are indexed [sender][receiver].

    None on the diagonal, and where the sender cannot reach the receiver.
    """

    hosts: int
    rate: str | None  # what each host may send, if that was set
    latency: list[list[float | None]]  # seconds, one way
    bandwidth: list[list[float | None]]  # bits a second

    def matrix(self, name: str) -> np.ndarray:
        """`latency` or `bandwidth` as an array, nan for None."""
        return np.array(getattr(self, name), float)

    @property
    def unreachable(self) -> list[str]:
        """Pairs that were not measured, a sentence each."""
        pairs = np.argwhere(np.isnan(self.matrix("bandwidth")))
        return [f"host {i} cannot reach host {j}" for i, j in pairs if i != j]

    @property
    def faults(self) -> list[Fault]:
        """Slow hosts and links, by the time that a megabyte takes."""
        if self.hosts < 2:
            return []
        return localise(self.matrix("latency") + 8e6 / self.matrix("bandwidth"))

    def link(self) -> Link:
        """A link as good as the worst pair, which holds everybody up.

        Raises:
          ValueError: a pair has none.
        """
        if self.unreachable:
            raise ValueError(f"the probe gives no link: {', '.join(self.unreachable)}")
        bandwidth, latency = self.matrix("bandwidth"), self.matrix("latency")
        return Link(float(np.nanmin(bandwidth)), float(np.nanmax(latency)))


def parse_link(text: str, **options: float) -> Link:
    """As `Link.parse`; or the link of a probe, of whose file the text is the path.

    A probe's latency and headers are measured.
    """
    return load(text).link() if text.endswith(".json") else Link.parse(text, **options)


def load(path: str | os.PathLike) -> Probe:
    """Reads probe.json.

    Raises:
      ValueError: it is none.
    """
    try:
        return Probe(**json.loads(Path(path).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of `cluster --probe`: {error}") from None


def throttled_link(rate: str) -> Link:
    """What joins the hosts of `cluster --rate`: headers of Ethernet frames, a token bucket."""
    burst = netns.burst_bytes(netns.parse_rate(rate))
    return Link.parse(rate, latency=LATENCY, overhead=ETHERNET, burst=burst)


class Wire:
    """One end of a connection."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        connection.settimeout(SILENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, size: int) -> None:
        """Sends so many bytes."""
        self._socket.sendall(bytes(size))

    def receive(self, size: int) -> float:
        """Takes so many bytes; seconds from when SKIPPED of them were here to the last."""
        buffer, got, begin, skipped = bytearray(1 << 16), 0, None, 0
        while got < size:
            count = self._socket.recv_into(buffer, min(len(buffer), size - got))
            if not count:
                raise ConnectionError("the other host has gone")
            got += count
            if begin is None and got >= min(SKIPPED, size // 4):
                begin, skipped = time.perf_counter(), got
        assert begin is not None
        seconds = time.perf_counter() - begin
        return seconds * size / max(size - skipped, 1)

    def send_number(self, value: float) -> None:
        """Sends a number."""
        self._socket.sendall(f"{value:<{WORDS}.9g}".encode()[:WORDS])

    def receive_number(self) -> float:
        """Takes a number."""
        text = b""
        while len(text) < WORDS:
            part = self._socket.recv(WORDS - len(text))
            if not part:
                raise ConnectionError("the other host has gone")
            text += part
        return float(text)


def ping(wire: Wire) -> tuple[float, float]:
    """The sender's part: latency in seconds and bandwidth in bits a second."""
    trips = []
    for _ in range(PINGS):
        start = time.perf_counter()
        wire.send(SMALL)
        wire.receive(SMALL)
        trips.append(time.perf_counter() - start)
    size, rates = FIRST, []
    for i in range(REPEATS + 1):
        wire.send_number(size)
        wire.send(size)
        seconds = max(wire.receive_number(), 1e-9)
        if i:
            rates.append(8 * size / seconds)
        else:
            size = int(min(max(size * SECONDS / seconds, 3 * SKIPPED), LARGEST))
    return statistics.median(trips) / 2, statistics.median(rates)


def pong(wire: Wire) -> None:
    """The receiver's part."""
    for _ in range(PINGS):
        wire.receive(SMALL)
        wire.send(SMALL)
    for _ in range(REPEATS + 1):
        size = int(wire.receive_number())
        wire.send_number(wire.receive(size))


def measure(me: int, addresses: list[tuple[str, int]], meet) -> list[list[float]]:
    """One host's part of the probe.

    Args:
      me: this host's number.
      addresses: host and port of each.
      meet: waits for all hosts.

    Returns:
      for each host, latency and bandwidth from here to it; nan to itself and to whom it cannot
      reach.
    """
    row = [[float("nan")] * 2 for _ in addresses]
    with socket.create_server(addresses[me]) as server:
        server.settimeout(ACCEPT)
        meet()
        for i in range(len(addresses)):
            for j in range(len(addresses)):
                try:
                    if i == me != j:
                        with socket.create_connection(addresses[j], CONNECT) as connection:
                            row[j] = list(ping(Wire(connection)))
                    elif j == me != i:
                        with server.accept()[0] as connection:
                            pong(Wire(connection))
                except OSError as error:
                    print(f"from host {i} to host {j}: {error}", file=sys.stderr, flush=True)
                meet()
    return row


def report(probe: Probe) -> str:
    """The matrices as a table, and what is slow."""
    where = f"each sends at {probe.rate}" if probe.rate else "not throttled"
    lines = [f"{probe.hosts} hosts, {where}: Mbit/s (latency in us), sender by row"]
    lines.append("".join([" " * 8, *(f"{f'to {j}':>18}" for j in range(probe.hosts))]))
    for i in range(probe.hosts):
        cells = [f"from {i:<3}"]
        for latency, bandwidth in zip(probe.latency[i], probe.bandwidth[i]):
            text = "-"
            if latency is not None and bandwidth is not None:
                text = f"{bandwidth / 1e6:.4g} ({1e6 * latency:.0f})"
            cells.append(f"{text:>18}")
        lines.append("".join(cells))
    cut = probe.unreachable
    lines += map(str, [*cut, *probe.faults] or ["no host or link stands out"])
    if probe.hosts > 1 and not cut:
        link = probe.link()
        measured = f"{link.bandwidth / 1e6:.4g}mbit@{1e6 * link.latency:.0f}us"
        lines.append(f"for plan: --links={measured} --overhead=1")  # without headers
    return "\n".join(lines)


def main(path: str | None = None, rate: str | None = None) -> int:
    """One host of a job; the first one prints the table and writes `path`.

    Returns:
      the exit code: 1, from the first one, if a host cannot reach another.
    """
    import jax  # joins the job: addresses and barriers go over its coordination service

    from jaxcomm.training.distributed import client, initialize

    if not initialize():
        raise ValueError("probe: this process is part of no job; start it by experiments.cluster")
    me, count, store = jax.process_index(), jax.process_count(), client()
    throttled = bool(os.environ.get("JAXCOMM_COUNTER"))
    address = own_address(throttled)
    mine = (address, PORT if throttled else free_port(address))
    store.key_value_set(f"probe/address/{me}", json.dumps(mine))
    text = [store.blocking_key_value_get(f"probe/address/{i}", 60_000) for i in range(count)]
    rounds = iter(range(1 << 30))
    meet = lambda: store.wait_at_barrier(f"probe/{next(rounds)}", 600_000)
    row = measure(me, [tuple(json.loads(t)) for t in text], meet)
    store.key_value_set(f"probe/row/{me}", json.dumps(row))
    code = 0
    if me == 0:
        found = [store.blocking_key_value_get(f"probe/row/{i}", 60_000) for i in range(count)]
        known = lambda x: None if np.isnan(x) else x
        latency, bandwidth = (
            [[known(pair[k]) for pair in json.loads(text)] for text in found] for k in (0, 1)
        )
        result = Probe(count, rate or None, latency, bandwidth)
        if path:
            Path(path).write_text(json.dumps(dataclasses.asdict(result), indent=1))
        print(report(result), flush=True)
        code = 1 if result.unreachable else 0
    meet()
    return code


def own_address(throttled: bool) -> str:
    """The address under which other hosts reach this one."""
    if throttled:  # the namespace's hosts file says so
        return socket.gethostbyname(socket.gethostname())
    coordinator = os.environ.get("JAXCOMM_COORDINATOR", "127.0.0.1:0").rpartition(":")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect((coordinator, 9))  # sends nothing; chooses the interface
        return outward.getsockname()[0]


def free_port(address: str) -> int:
    """A port nobody listens to now."""
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
