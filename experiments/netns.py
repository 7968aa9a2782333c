"""Hosts that share this machine: network namespaces on a switch, each behind a token bucket.

    host 0: eth0 --tbf--> port 0 \
    host 1: eth0 --tbf--> port 1 -- bridge
    ...

Every byte is sent by some host, so a bucket on what each host sends throttles all of them. The
bridge lives in a namespace of its own: no interface, address or firewall rule of the machine
takes part. Names carry the launcher's process number (jc<pid>n<i> a host, jc<pid>sw the switch),
so what a killed launcher left behind is recognised and removed by the next one. Linux, root.
TCP is Linux's default, CUBIC, whatever the machine's is: BBR pauses 0.2 s now and then to probe.
"""

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

COUNTER = "/sys/class/net/eth0/statistics/tx_bytes"  # as a host sees it
LOOPBACK = "/sys/class/net/lo/statistics/tx_bytes"  # without namespaces: of all hosts together
CONGESTION = "cubic"  # what TCP does
SUBNET = "10.77.0.0/16"
HOST_FILES = "/etc/netns"  # `ip netns exec` mounts what is in here over /etc
NAMESPACES = "/var/run/netns"
NAME = re.compile(r"jc(\d+)(?:n\d+|sw)")
RATE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(i?)(bit|bps)", re.IGNORECASE)
LARGEST = 60_000  # hosts that fit the subnet
LATENCY = 0.05  # seconds a packet may wait for tokens before it is dropped
BURST_SECONDS, BURST_BYTES = 0.01, (32_000, 262_144)  # tokens a silent host saves up, clipped


class Counters(NamedTuple):
    """What a host has transmitted.

    The kernel hands a host's interface up to 64 kB under one header and cuts it into packets
    later: the interface counts that header once, the bucket in every packet, as a link would.
    """

    sent_bytes: int  # by the interface: what runs read at COUNTER
    wire_bytes: int  # by the bucket: with the headers of every packet


class NetworkError(RuntimeError):
    """Why this machine cannot have throttled hosts, in one sentence."""


def parse_rate(text: str) -> float:
    """Bits a second of a rate as `tc` writes them: 100mbit, 1.5gbit, 20mbps (bytes a second)."""
    match = RATE.fullmatch(text)
    if not match or not float(match[1]):
        raise ValueError(
            f"rate must be a positive number with a unit such as 10mbit, 100mbit or 1gbit, "
            f"got {text!r}"
        )
    number, prefix, binary, unit = match.groups()
    scale = (1024 if binary else 1000) ** ("kmgt".index(prefix.lower()) + 1 if prefix else 0)
    return float(number) * scale * (8 if unit.lower() == "bps" else 1)


def check_machine() -> None:
    """Raises a NetworkError if this process cannot make network namespaces."""
    if os.geteuid() != 0:
        raise NetworkError(
            "--rate needs root (it makes network namespaces); run as root, or without --rate for "
            "plain loopback"
        )
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        raise NetworkError(
            f"--rate needs iproute2 (not on the PATH: {', '.join(missing)}); install it, or run "
            "without --rate for plain loopback"
        )


def remove_stale() -> None:
    """Removes what launchers that are no longer alive have left."""
    names = _listing(NAMESPACES) | _listing(HOST_FILES)
    found = ((name, NAME.fullmatch(name)) for name in names)
    _remove(name for name, match in found if match and not os.path.exists(f"/proc/{match[1]}"))


def burst_bytes(rate: float) -> float:
    """Bytes that the bucket of so many bits a second passes at once when it was silent."""
    return min(max(rate / 8 * BURST_SECONDS, BURST_BYTES[0]), BURST_BYTES[1])


def bucket(rate: float) -> str:
    """The token bucket of so many bits a second, as `tc qdisc` takes it."""
    burst = burst_bytes(rate)
    return f"tbf rate {rate:.0f}bit burst {burst:.0f}b latency {LATENCY * 1e3:.0f}ms"


class Network:
    """Throttled hosts for as long as the `with` block runs.

    Args:
      hosts: how many.
      rate: what each of them may send, as in `parse_rate`.

    Raises:
      NetworkError: on entering, if this machine does not allow it.
    """

    def __init__(self, hosts: int, rate: str):
        if not 1 <= hosts <= LARGEST:
            raise ValueError(f"hosts must be from 1 to {LARGEST}, got {hosts}")
        self.rate = parse_rate(rate)
        self.names = [f"jc{os.getpid()}n{i}" for i in range(hosts)]
        self.addresses = [f"10.77.{i // 250}.{i % 250 + 1}" for i in range(hosts)]
        self.switch = f"jc{os.getpid()}sw"

    def __enter__(self):
        check_machine()
        remove_stale()
        atexit.register(self.remove)
        try:
            self._create()
        except BaseException as error:
            self.remove()
            if not isinstance(error, (subprocess.CalledProcessError, OSError)):
                raise
            why = getattr(error, "stderr", None) or str(error)
            raise NetworkError(f"this machine allows no throttled hosts: {why.strip()}") from error
        return self

    def __exit__(self, *_):
        self.remove()

    def remove(self) -> None:
        """Takes everything down; does nothing the second time."""
        atexit.unregister(self.remove)
        _remove([*self.names, self.switch])

    def enter(self, host: int) -> list[str]:
        """The words before a command that make it run on this host."""
        return ["ip", "netns", "exec", self.names[host]]

    def counters(self) -> list[Counters]:
        """What each host has transmitted so far."""
        return [_counters(name) for name in self.names]

    def _create(self) -> None:
        hosts = list(enumerate(zip(self.names, self.addresses)))
        _batch([], (f"netns add {name}" for name in [self.switch, *self.names]))
        _batch(
            [],
            (
                f"link add name p{i} netns {self.switch} type veth peer name eth0 netns {name}"
                for i, (name, _) in hosts
            ),
        )
        ports = (f"link set p{i} master br0 up" for i, _ in hosts)
        _batch(["-n", self.switch], ["link add br0 type bridge", "link set br0 up", *ports])
        for _, (name, address) in hosts:
            self._configure(name, address)

    def _configure(self, name: str, address: str) -> None:
        _batch(
            ["-n", name],
            (
                "link set lo up",
                f"addr add {address}/16 dev eth0",
                "link set eth0 addrgenmode none",  # no IPv6 chatter in the counter
                "link set eth0 up",
            ),
        )
        # by its route: a namespace may not set an algorithm that the machine restricts
        route = f"{SUBNET} dev eth0 proto kernel scope link src {address} congctl {CONGESTION}"
        _run("ip", "-n", name, "route", "replace", *route.split())
        _run("tc", "-n", name, *f"qdisc add dev eth0 root {bucket(self.rate)}".split())
        os.makedirs(f"{HOST_FILES}/{name}")
        with open(f"{HOST_FILES}/{name}/hosts", "w") as file:  # gloo binds to the host's name
            file.write(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")


def _listing(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _counters(name: str) -> Counters:
    link = json.loads(_run(*f"ip -n {name} -s -j link show dev eth0".split()))[0]
    bucket = json.loads(_run(*f"tc -n {name} -s -j qdisc show dev eth0".split()))[0]
    return Counters(link["stats64"]["tx"]["bytes"], bucket["bytes"])


def _remove(names: Iterable[str]) -> None:
    there = _listing(NAMESPACES)
    for name in names:
        if name in there:
            _run("ip", "netns", "del", name, check=False)
        shutil.rmtree(f"{HOST_FILES}/{name}", ignore_errors=True)


def _batch(options: list[str], lines: Iterable[str]) -> None:
    _run("ip", *options, "-batch", "-", stdin="\n".join(lines) + "\n")


def _run(*command: str, stdin: str = "", check: bool = True) -> str:
    """Output of a command, which is out of reach of the terminal's Ctrl-C."""
    return subprocess.run(
        command, input=stdin, check=check, capture_output=True, text=True, start_new_session=True
    ).stdout
