"""Starts a job of several real processes on this machine.

    python -m experiments.cluster --hosts=4 -- -m experiments.train --config=configs/FILE.py
    python -m experiments.cluster --hosts=2 --rate=100mbit --timeout=600 -- my_program.py
    python -m experiments.cluster --hosts=4 --rate=100mbit --probe --workdir=DIR
    python -m experiments.cluster --hosts=4 --restarts=3 -- -m experiments.train ...

What follows `--` are the arguments of the Python interpreter: any module, script or `-c` code. The
processes find each other by `jaxcomm.training.distributed.initialize()`. With `--rate` each of
them is a host of its own that sends no faster than that; this needs root and iproute2.

With `--restarts` a job that lost a process (killed, crashed, preempted, or named by the others as
stuck) is ended and started again, with a fresh port, so that it goes on from its last checkpoint.
Not started again: what ended well, timed out, was stopped by a signal to this program, or was the
user's mistake (code 2). With `--fewer_hosts=M` a rank that was the first to fail in two attempts
in a row is a host that is gone, and the next attempt has one host less, down to M. JAXCOMM_ATTEMPT
tells a process which attempt it is part of, from 0. With `--losses=K` up to K processes other than
rank 0 may fail while the others go on, if the program can (config.on_failure=continue), but for a
mistake of the user; who still runs --grace seconds after rank 0 has ended well has failed as well.

The exit code is 0, or that of the rank that failed (128 + the number of the signal that killed it),
1 if more than K still ran, 124 after a time-out, 130 after Ctrl-C, 2 if the job could not be
started.
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
from experiments.processes import MISTAKE

# As in jaxcomm.training.distributed, which takes JAX with it; a test compares them.
COORDINATOR, PROCESSES = "JAXCOMM_COORDINATOR", "JAXCOMM_PROCESSES"
PROCESS_ID, COUNTER = "JAXCOMM_PROCESS_ID", "JAXCOMM_COUNTER"
ATTEMPT = "JAXCOMM_ATTEMPT"
COORDINATOR_PORT = 7777  # in a namespace, where every port is free
DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S*")
LONGEST = 1e9  # seconds; Python's own waits end at nine times that


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run.

    Args:
      arguments: of the Python interpreter.
      hosts: how many processes.
      rate: what each of them may send, as in `netns.parse_rate`; None for plain loopback.
      devices_per_host: CPU devices of a process.
      timeout: seconds after which the job is ended, up to 1e9; None for no limit.
      grace: seconds between SIGTERM and SIGKILL for processes that have to be ended, up to 1e9.
      restarts: how often the job is started again after it lost a process.
      losses: how many processes other than rank 0 may fail while the others go on.
      fewer_hosts: with how few hosts it may go on; None for always `hosts`.

    Raises:
      ValueError: one of them makes no sense.
    """

    arguments: tuple[str, ...]
    hosts: int
    rate: str | None = None
    devices_per_host: int = 1
    timeout: float | None = None
    grace: float = 5.0
    restarts: int = 0
    fewer_hosts: int | None = None
    losses: int = 0

    def __post_init__(self):
        if not self.arguments:
            raise ValueError(
                "nothing to run; give the arguments of the Python interpreter after --"
            )
        for name in ("hosts", "devices_per_host"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.timeout is not None and not 0 < self.timeout <= LONGEST:
            raise ValueError(
                f"timeout must be positive and at most {LONGEST:g} s, got {self.timeout:g}"
            )
        if not 0 <= self.grace <= LONGEST:
            raise ValueError(f"grace must be from 0 to {LONGEST:g} s, got {self.grace:g}")
        for name in ("restarts", "losses"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.fewer_hosts is not None and not 1 <= self.fewer_hosts <= self.hosts:
            raise ValueError(f"fewer_hosts must be from 1 to {self.hosts}, got {self.fewer_hosts}")
        if self.rate is not None:
            netns.parse_rate(self.rate)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a job; `counters` is what each host transmitted (None on loopback).

    `outcome` and `seconds` are those of the last attempt, `failures` the ones before it.
    """

    job: Job
    outcome: processes.Outcome
    counters: tuple[netns.Counters, ...] | None
    setup_seconds: float
    seconds: float
    failures: tuple[processes.Outcome, ...] = ()

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
            "failures": [outcome.reason for outcome in self.failures],
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
    deadline = None if job.timeout is None else begin + job.timeout
    failures: list[processes.Outcome] = []
    with processes.Events() as events, contextlib.ExitStack() as stack:
        network = None
        if job.rate is not None:
            network = stack.enter_context(netns.Network(job.hosts, job.rate))
        setup = time.monotonic() - begin
        before = network.counters() if network else []
        while True:
            hosts = hosts_left(job, failures)
            commands = _commands(job, network, len(failures), hosts)
            started = time.monotonic()
            outcome = processes.run(
                commands,
                events,
                timeout=job.timeout,
                grace=job.grace,
                deadline=deadline,
                losses=job.losses,
            )
            if not starts_again(outcome, job.restarts - len(failures)):
                break
            failures.append(outcome)
            again = f"attempt {len(failures) + 1} of {job.restarts + 1}"
            print(f"cluster: {outcome.reason}; {again}", file=sys.stderr, flush=True)
        seconds = time.monotonic() - started
        after = network.counters() if network else []
    sent = tuple(_minus(new, old) for new, old in zip(after, before)) if network else None
    return Report(job, outcome, sent, setup, seconds, tuple(failures))


def first_failed(outcome: processes.Outcome) -> processes.Ended | None:
    """The rank that failed first; None if none did (a time-out, a signal, success)."""
    failed = [rank for rank in outcome.ranks if not rank.stopped and rank.exit_code]
    return min(failed, key=lambda rank: rank.seconds) if failed else None


def starts_again(outcome: processes.Outcome, left: int) -> bool:
    """Whether a job that ended like this is started again, with so many restarts left."""
    return left > 0 and not outcome.final and outcome.exit_code not in (0, MISTAKE)


def hosts_left(job: Job, failures: list[processes.Outcome]) -> int:
    """With how many hosts the next attempt is made: one less for every pair of equal failures."""
    least = job.hosts if job.fewer_hosts is None else job.fewer_hosts
    hosts, last = job.hosts, None
    for failed in map(first_failed, failures):
        rank = failed.rank if failed else None
        if rank is not None and rank == last and hosts > least:
            hosts, rank = hosts - 1, None
        last = rank
    return hosts


def _commands(
    job: Job, network: netns.Network | None, attempt: int, hosts: int
) -> list[processes.Command]:
    if network is None:
        coordinator, counter = f"127.0.0.1:{_free_port()}", None
    else:
        coordinator = f"{network.addresses[0]}:{COORDINATOR_PORT + attempt}"
        counter = netns.COUNTER
    job = dataclasses.replace(job, hosts=hosts, fewer_hosts=None)
    base = {**os.environ, ATTEMPT: str(attempt)}
    return [
        processes.Command(
            [*(network.enter(rank) if network else ()), sys.executable, *job.arguments],
            environment(base, job, rank, coordinator, counter),
        )
        for rank in range(hosts)
    ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _minus(new: netns.Counters, old: netns.Counters) -> netns.Counters:
    return netns.Counters(*(a - b for a, b in zip(new, old)))


def table(report: Report) -> Table:
    """One row a host."""
    where = f"at {report.job.rate}" if report.job.rate else "on loopback"
    title = f"{len(report.outcome.ranks)} hosts {where}, {report.seconds:.1f} s"
    if report.failures:
        title += f", attempt {len(report.failures) + 1}"
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
    flags.DEFINE_integer("restarts", 0, "Starts after the loss of a process.", flag_values=values)
    flags.DEFINE_integer(
        "fewer_hosts", None, "With how few hosts to go on; default: all.", flag_values=values
    )
    flags.DEFINE_integer(
        "losses", 0, "Processes that may fail while the others go on.", flag_values=values
    )
    flags.DEFINE_bool("probe", False, "Measure the links between the hosts.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where to write cluster.json.", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs what the flags and the arguments after `--` say; returns the exit code."""
    names = ("hosts", "rate", "devices_per_host", "timeout", "grace")
    names += ("restarts", "fewer_hosts", "losses")
    arguments = tuple(argv[1:])
    if values.probe:
        file = os.path.join(values.workdir, "probe.json") if values.workdir else ""
        arguments = ("-m", "experiments.probe", file, values.rate or "")
    try:
        job = Job(arguments, **{name: getattr(values, name) for name in names})
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


def parse_flags(argv: list[str]) -> list[str]:
    """What the flags leave of the arguments; a flag that cannot be ends the program with code 2."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_refuse(error))


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
    app.run(main, flags_parser=parse_flags)
