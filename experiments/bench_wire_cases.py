"""What `experiments.bench wire` measures: which codec, by which exchange, how large."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

from experiments import bench_codec
from jaxcomm import compressors as codecs
from jaxcomm.collectives import exchange_bytes
from jaxcomm.compressors import Compressor

SENT_BYTES = 1.25e6  # at least, in an exchange of the comparison with the counter
ELEMENTS = 10_000_000  # of the timed exchanges
TIMED = (
    ("identity", "dense"),
    *(("sign l1", "two_phase"), ("sign l1", "pipelined two_phase")),
    *(("block_top_k 1%", "gather"), ("block_top_k 1%", "pipelined gather")),
)
PIPELINED = "pipelined "  # before an exchange by jaxcomm.PipelinedMean, in so many buckets:
BUCKETS = 8
REPEATS = 9  # of which the times are medians, the bytes means
EXCHANGES = ("gather", "two_phase", "ring", "hierarchical")


@dataclasses.dataclass(frozen=True)
class Case:
    """One exchange."""

    compressor: str  # a name of `compressors()`
    exchange: str
    elements: int
    bucket_bytes: int | None = None


def compressors() -> dict[str, Compressor]:
    """Those of `bench codec`, and sparse ones that keep more: messages need fewer elements."""
    return bench_codec.table() | {
        "top_k 10%": codecs.top_k(0.1),
        "block_top_k 10%": codecs.block_top_k(0.1),
        "threshold_top_k 10%": codecs.threshold_top_k(0.1),
        "rand_k 10%": codecs.rand_k(0.1),
        "block_top_k 10% + 2 bits": codecs.compose(codecs.block_top_k(0.1), codecs.quantize(2)),
    }


def sizes_of(exchange: str, hosts: int) -> dict[str, int]:
    """Workers along each axis; the fast one of a hierarchical exchange has two."""
    if exchange == "hierarchical":
        return {"fast": 2, "slow": hosts // 2}
    return {"workers": hosts}


def single(values: Iterable) -> Any:
    """The only value, or a tuple of several: how an axis and how axes are named."""
    first, *others = values
    return (first, *others) if others else first


def byte_cases(hosts: int) -> list[Case]:
    """Every compressor by every exchange, with messages just large enough."""
    names = [name for name in compressors() if "1%" not in name]
    cases = [Case("identity", "dense", elements_for("identity", "dense", hosts))]
    for name in names:
        ways = [e for e in EXCHANGES if e != "hierarchical" or (hosts % 2 == 0 and hosts > 2)]
        if name == "identity":
            ways = ["ring"]  # its other exchanges are the dense sum
        cases += [Case(name, way, elements_for(name, way, hosts)) for way in ways]
    return cases


def timed_cases() -> list[Case]:
    """The exchanges that are compared with the time their bytes need."""
    return [Case(*pair, ELEMENTS) for pair in TIMED]


@functools.cache
def elements_for(compressor: str, exchange: str, hosts: int) -> int:
    """Elements that make a host send SENT_BYTES or a little more; an odd number."""
    codec, workers = compressors()[compressor], single(sizes_of(exchange, hosts).values())
    elements = 1_000_003
    while True:
        sent = exchange_bytes(exchange, codec, elements, workers)
        if SENT_BYTES <= sent <= 1.1 * SENT_BYTES:
            return elements
        elements = math.ceil(elements * 1.03 * SENT_BYTES / sent) | 1
