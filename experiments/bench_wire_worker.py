"""One host's part of `experiments.bench wire`: runs exchanges, reads its network counter.

    python -m experiments.bench_wire_worker TODO.json ROWS.jsonl RATE

TODO.json is a list of cases; rank 0 appends a line to ROWS.jsonl for each. All bytes are those one
host sends, the mean over hosts; the counter is read after everybody has received everything.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import netns
from experiments.bench_wire_cases import (
    BUCKETS,
    PIPELINED,
    REPEATS,
    Case,
    compressors,
    single,
    sizes_of,
)
from experiments.rows import append_row
from jaxcomm.collectives import exchange_bytes, exchange_mean
from jaxcomm.traffic.alone import without_communication
from jaxcomm.traffic.count import count
from jaxcomm.training.distributed import PROCESS_ID, PROCESSES, initialize
from jaxcomm.training.memory import keep_memory
from jaxcomm.training.pipeline import PipelinedMean
from jaxcomm.transforms.common import message_key, zero_count


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a case; bytes one host sends in an exchange, seconds are medians."""

    compressor: str
    exchange: str
    elements: int
    bucket_bytes: int | None
    hosts: int
    rate: str
    payload_bytes: int  # of one message of the codec
    formula_bytes: float  # what the exchange should send
    counted_bytes: float  # by jaxcomm.traffic
    counter_bytes: float  # by the interface's counter
    frame_bytes: float | None  # by the token bucket: with the headers of every packet
    seconds: float  # of an exchange, on the host that took longest
    codec_seconds: float  # of the same program without its collectives, all hosts at once
    load: float  # runnable processes on this machine, the minute's mean, before the case


def program(case: Case) -> tuple[Callable, Mesh, dict[str, int]]:
    """The exchange as a function of the global array (n d,), on a mesh of all devices.

    Of a pipelined one: the same exchange as one program.
    """
    axes = sizes_of(case.exchange, jax.device_count())
    kind = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kind)
    codec = compressors()[case.compressor]

    def mean(x):
        name = single(axes)
        key = message_key(0, zero_count(), name, codec)
        exchange = case.exchange.removeprefix(PIPELINED)
        way = {"exchange": exchange, "bucket_bytes": case.bucket_bytes}
        return exchange_mean(x, codec, name, key, **way).mean

    return jax.shard_map(mean, mesh=mesh, in_specs=P(tuple(axes)), out_specs=P()), mesh, axes


def pipelined(case: Case, mesh: Mesh) -> PipelinedMean:
    """The exchange whose buckets travel while others are coded."""
    codec, exchange = compressors()[case.compressor], case.exchange.removeprefix(PIPELINED)
    name = single(mesh.axis_names)
    return PipelinedMean(codec, name, exchange=exchange, buckets=BUCKETS, mesh=mesh)


def measure(case: Case, rate: str) -> Row:
    """Runs one case on all hosts together."""
    fn, mesh, axes = program(case)
    codec, n = compressors()[case.compressor], jax.process_count()
    spread = NamedSharding(mesh, P(tuple(axes)))
    local = np.random.default_rng(jax.process_index()).standard_normal(case.elements, np.float32)
    x = jax.make_array_from_process_local_data(spread, local)
    alone = jax.jit(without_communication(jax.make_jaxpr(fn)(x), axes))
    mine = jax.device_put(local, jax.local_devices()[0])
    exchange, bucket_bytes = case.exchange, case.bucket_bytes
    run, argument = jax.jit(fn), x
    if exchange.startswith(PIPELINED):
        run = pipelined(case, mesh)
        argument = jax.make_array_from_process_local_data(spread, local[None])
        exchange, bucket_bytes = run.exchange, run.bucket_bytes(case.elements)
        fn = program(dataclasses.replace(case, bucket_bytes=bucket_bytes))[0]  # to be counted
    for _ in range(2):
        jax.block_until_ready((run(argument), alone(mine)))
    load = os.getloadavg()[0]
    _meet()
    before = _counters()
    pairs = [(_seconds(run, argument), _seconds(alone, mine)) for _ in range(REPEATS)]
    _meet()
    after = _counters()
    sent = [b - a for a, b in zip(before, after)]
    share = n if not os.environ.get("JAXCOMM_COUNTER") else 1  # all hosts have one loopback
    everyone = multihost_utils.process_allgather(np.array([*sent, *sum(pairs, ())]))
    counters = everyone[:, : len(sent)].mean(0) / REPEATS / share
    slowest = everyone[:, len(sent) :].max(0)
    return Row(
        **dataclasses.asdict(case),
        hosts=n,
        rate=rate,
        payload_bytes=codec.payload_bytes(case.elements),
        formula_bytes=exchange_bytes(
            exchange, codec, case.elements, single(axes.values()), bucket_bytes
        ),
        counted_bytes=sum(c.sent_bytes for c in count(fn, x, axis_sizes=axes)),
        counter_bytes=float(counters[0]),
        frame_bytes=float(counters[1]) if len(sent) > 1 else None,
        seconds=statistics.median(slowest[0::2].tolist()),
        codec_seconds=statistics.median(slowest[1::2].tolist()),
        load=load,
    )


def _meet() -> None:
    """All hosts wait for each other; some hundred bytes."""
    multihost_utils.sync_global_devices("bench wire")


def _seconds(call: Callable, argument) -> float:
    _meet()
    start = time.perf_counter()
    jax.block_until_ready(call(argument))
    return time.perf_counter() - start


def _counters() -> list[int]:
    """This host's transmitted bytes: by its interface, and by its token bucket if it has one."""
    path = os.environ.get("JAXCOMM_COUNTER")
    sent = [int(Path(path or netns.LOOPBACK).read_text())]
    if path is None:
        return sent
    shown = subprocess.run(
        ["tc", "-s", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True, check=True
    )
    match = re.search(r"Sent (\d+) bytes", shown.stdout)
    return [*sent, int(match[1])] if match else sent


def _keep_to_own_cores() -> None:
    """This host's share of the machine's cores, at least one: hosts do not move each other."""
    cores = sorted(os.sched_getaffinity(0))
    mine, hosts = int(os.environ[PROCESS_ID]), int(os.environ[PROCESSES])
    os.sched_setaffinity(0, cores[mine % len(cores) :: hosts])


def main(todo: str, rows: str, rate: str) -> None:
    _keep_to_own_cores()
    keep_memory()  # else the page faults of arrays of 40 MB take longer than the codecs
    initialize()
    cases = [Case(**case) for case in json.loads(Path(todo).read_text())]
    for i, case in enumerate(cases):
        row = measure(case, rate)
        if jax.process_index():
            continue
        append_row(rows, dataclasses.asdict(row))
        ratio = row.counter_bytes / max(row.counted_bytes, 1)
        print(
            f"{i + 1}/{len(cases)} {row.compressor}, {row.exchange}: counter/traffic {ratio:.3f}, "
            f"{row.seconds:.3f} s, codec {row.codec_seconds:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
