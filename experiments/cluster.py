"""Starts a job of several real processes on this machine.

    python -m experiments.cluster --hosts=4 -- -m experiments.train --config=configs/FILE.py
    python -m experiments.cluster --hosts=2 --rate=100mbit --timeout=600 -- my_program.py

What follows `--` are the arguments of the Python interpreter: any module, script or `-c` code. The
processes find each other by `jaxcomm.training.distributed.initialize()`. With `--rate` each of
them is a host of its own that sends no faster than that; this needs root and iproute2.

The exit code is 0, or that of the rank that failed (128 + the number of the signal that killed it),
124 after a time-out, 130 after Ctrl-C, 2 if the job could not be started.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping

import rich
from absl import app, flags
from rich import box
from rich.table import Table

from experiments import netns, processes

# As in jaxcomm.training.distributed, which takes JAX with it; a test compares them.
COORDINATOR, PROCESSES = "JAXCOMM_COORDINATOR", "JAXCOMM_PROCESSES"
PROCESS_ID, COUNTER = "JAXCOMM_PROCESS_ID", "JAXCOMM_COUNTER"
COORDINATOR_PORT = 7777  # in a namespace, where every port is free
DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S*")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run.

    Args:
      arguments: of the Python interpreter.
      hosts: how many processes.
      rate: what each of them may send, as in `netns.parse_rate`; None for plain loopback.
      devices_per_host: CPU devices of a process.
      timeout: seconds after which the job is ended; None for no limit.
      grace: seconds between SIGTERM and SIGKILL for processes that have to be ended.

    Raises:
      ValueError: one of them makes no sense.
    """

    arguments: tuple[str, ...]
    hosts: int
    rate: str | None = None
    devices_per_host: int = 1
    timeout: float | None = None
    grace: float = 5.0

    def __post_init__(self):
        if not self.arguments:
            raise ValueError(
                "nothing to run; give the arguments of the Python interpreter after --"
            )
        for name in ("hosts", "devices_per_host"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be positive, got {self.timeout:g}")
        if not self.grace >= 0:
            raise ValueError(f"grace must not be negative, got {self.grace:g}")
        if self.rate is not None:
            netns.parse_rate(self.rate)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a job; `counters` is what each host transmitted (None on loopback)."""

    job: Job
    outcome: processes.Outcome
    counters: tuple[netns.Counters, ...] | None
    setup_seconds: float
    seconds: float

    def as_dict(self) -> dict:
        """For JSON: the job, its outcome and one entry a host."""
        hosts = [dataclasses.asdict(rank) for rank in self.outcome.ranks]
        for host, counters in zip(hosts, self.counters or ()):
            host.update(counters._asdict())
        return {
            **dataclasses.asdict(self.job),
            "exit_code": self.outcome.exit_code,
            "reason": self.outcome.reason,
            "setup_seconds": self.setup_seconds,
            "seconds": self.seconds,
            "ranks": hosts,
        }


def environment(
    base: Mapping[str, str], job: Job, rank: int, coordinator: str, counter: str | None
) -> dict[str, str]:
    """The environment of one process."""
    env = {name: value for name, value in base.items() if name != COUNTER}
    env |= {
        COORDINATOR: coordinator,
        PROCESSES: str(job.hosts),
        PROCESS_ID: str(rank),
        "JAX_COORDINATOR_BIND_ADDRESS": coordinator,  # JAX would listen to the whole network
        "JAX_NUM_CPU_DEVICES": str(job.devices_per_host),
        "PYTHONUNBUFFERED": "1",
    }
    env.setdefault("JAX_PLATFORMS", "cpu")  # the processes cannot share an accelerator
    if "XLA_FLAGS" in env:  # JAX refuses two device counts
        env["XLA_FLAGS"] = DEVICE_COUNT.sub("", env["XLA_FLAGS"])
    if any(name.lower().endswith("_proxy") for name in env):  # gRPC would take it
        for name in ("no_proxy", "NO_PROXY"):
            env[name] = ",".join(filter(None, (env.get(name), coordinator.rpartition(":")[0])))
    if counter is not None:
        env[COUNTER] = counter
    return env


def launch(job: Job) -> Report:
    """Runs the job to its end; call it from the main thread.

    Raises:
      netns.NetworkError: this machine does not allow throttled hosts.
    """
    begin = time.monotonic()
    with processes.Events() as events, contextlib.ExitStack() as stack:
        network = None
        if job.rate is not None:
            network = stack.enter_context(netns.Network(job.hosts, job.rate))
        commands = _commands(job, network)
        before = network.counters() if network else []
        started = time.monotonic()
        outcome = processes.run(commands, events, timeout=job.timeout, grace=job.grace)
        ended = time.monotonic()
        after = network.counters() if network else []
    sent = tuple(_minus(new, old) for new, old in zip(after, before)) if network else None
    return Report(job, outcome, sent, started - begin, ended - started)


def _commands(job: Job, network: netns.Network | None) -> list[processes.Command]:
    if network is None:
        coordinator, counter = f"127.0.0.1:{_free_port()}", None
    else:
        coordinator, counter = f"{network.addresses[0]}:{COORDINATOR_PORT}", netns.COUNTER
    return [
        processes.Command(
            [*(network.enter(rank) if network else ()), sys.executable, *job.arguments],
            environment(os.environ, job, rank, coordinator, counter),
        )
        for rank in range(job.hosts)
    ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _minus(new: netns.Counters, old: netns.Counters) -> netns.Counters:
    return netns.Counters(*(a - b for a, b in zip(new, old)))


def table(report: Report) -> Table:
    """One row a host."""
    where = f"at {report.job.rate}" if report.job.rate else "on loopback"
    title = f"{report.job.hosts} hosts {where}, {report.seconds:.1f} s"
    result = Table("host", "ended", "seconds", title=title, box=box.SIMPLE)
    for name in ("sent bytes", "with packet headers") if report.counters else ():
        result.add_column(name, justify="right")
    for i, rank in enumerate(report.outcome.ranks):
        how = "stopped" if rank.stopped else processes.describe(rank.exit_code)
        counts = [f"{count:,}" for count in report.counters[i]] if report.counters else []
        result.add_row(str(rank.rank), how, f"{rank.seconds:.1f}", *counts)
    return result


def define_flags(values: flags.FlagValues) -> None:
    """The command line of this program."""
    flags.DEFINE_integer("hosts", 2, "How many processes.", flag_values=values)
    flags.DEFINE_string(
        "rate", None, "What each may send, such as 100mbit; needs root.", flag_values=values
    )
    flags.DEFINE_integer("devices_per_host", 1, "CPU devices of each process.", flag_values=values)
    flags.DEFINE_float("timeout", None, "Seconds after which the job is ended.", flag_values=values)
    flags.DEFINE_float("grace", 5.0, "Seconds from SIGTERM to SIGKILL.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where to write cluster.json.", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs what the flags and the arguments after `--` say; returns the exit code."""
    names = ("hosts", "rate", "devices_per_host", "timeout", "grace")
    try:
        job = Job(tuple(argv[1:]), **{name: getattr(values, name) for name in names})
        if values.workdir:
            os.makedirs(values.workdir, exist_ok=True)
    except (ValueError, OSError) as error:
        return _refuse(error)
    try:
        report = launch(job)
    except netns.NetworkError as error:
        return _refuse(error)
    rich.print(table(report))
    if values.workdir:
        _write(os.path.join(values.workdir, "cluster.json"), report.as_dict())
    if report.outcome.reason:
        print(f"cluster: {report.outcome.reason}", file=sys.stderr, flush=True)
    return report.outcome.exit_code


def _refuse(error: Exception) -> int:
    print(f"cluster: {error}", file=sys.stderr)
    return 2


def _write(path: str, content: dict) -> None:
    with open(f"{path}.tmp", "w") as file:
        json.dump(content, file, indent=2)
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a rank may print what the terminal cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    define_flags(flags.FLAGS)
    app.run(main)
