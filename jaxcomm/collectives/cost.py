"""What an exchange costs: bytes that a worker sends, hop by hop, and the choice by time.

Bytes a worker sends, n workers, payload P(d) of a vector of d elements, L = ceil(d/n):

    dense         2 (n-1)/n * 4 d                                  2 (n-1) messages
    gather        (n-1) P(d)                                         n-1
    two_phase     (n-1) P(L) + (n-1) P(L)                          2 (n-1)
    ring          (n-1) P(L) + (n-1) P(L)                          2 (n-1)
    hierarchical  m workers on the fast axis, S = ceil(d/m): (m-1) 4 S there, twice, and of S
                  elements on the slow axis gather or ring, whichever is less

Predicted time of a hop: messages * latency + bytes / bandwidth (Hockney's model).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from jaxcomm.collectives.means import chunk_size
from jaxcomm.compressors._identity import Identity
from jaxcomm.compressors.base import Compressor
from jaxcomm.compressors.sparse import Sparsifier

EXCHANGES = ("gather", "two_phase", "ring", "dense", "hierarchical", "auto")

LATENCY = 1e-4  # seconds a message: what 'auto' assumes
BANDWIDTH = 1.25e8  # bytes a second and worker (1 Gbit/s): what 'auto' assumes

Workers = int | tuple[int, ...]  # along the axis, or along each of a tuple of axes


class Hop(NamedTuple):
    """One collective of an exchange, as a worker sees it."""

    collective: str
    axis: int  # 0, or 1 for the slow axis of a hierarchical exchange
    messages: int
    sent_bytes: float


class Bucket(NamedTuple):
    """A range of columns of the vector seen as rows (see `buckets`)."""

    start: int  # first column
    width: int  # columns
    size: int  # elements that are not padding


def exchange_hops(
    exchange: str, compressor: Compressor, size: int, workers: Workers
) -> tuple[Hop, ...]:
    """The collectives of an exchange of `size` elements, with the bytes a worker sends in each.

    Args:
      exchange: one of EXCHANGES.
      compressor: the codec.
      size: elements of the vector.
      workers: number of workers; (fast, slow) for a hierarchical exchange.

    Raises:
      ValueError: an unknown exchange, or one that the codec or the axes cannot do.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {EXCHANGES}, got {exchange!r}")
    exchange = resolve_exchange(exchange, compressor, size, workers)
    n = product(workers)
    if size == 0:
        return ()
    if exchange == "dense":
        return (Hop("all-reduce", 0, 2 * (n - 1), 2 * (n - 1) / n * 4 * size),)
    if exchange == "gather":
        return (Hop("all-gather", 0, n - 1, (n - 1) * compressor.payload_bytes(size)),)
    if exchange == "hierarchical":
        return _hierarchical_hops(compressor, size, workers)
    sent = (n - 1) * compressor.payload_bytes(chunk_size(size, n))
    first = "permute" if exchange == "ring" else "all-to-all"
    return Hop(first, 0, n - 1, sent), Hop("all-gather", 0, n - 1, sent)


def _hierarchical_hops(compressor, size: int, workers: Workers) -> tuple[Hop, ...]:
    if isinstance(workers, int) or len(workers) != 2:
        raise ValueError(f"a hierarchical exchange needs workers=(fast, slow), got {workers}")
    m, g = workers
    shard = chunk_size(size, m)
    dense = (m - 1) * 4 * shard
    slow = exchange_hops(slow_exchange(compressor, shard, g), compressor, shard, g)
    return (
        Hop("all-to-all", 0, m - 1, dense),
        *(hop._replace(axis=1) for hop in slow),
        Hop("all-gather", 0, m - 1, dense),
    )


def slow_exchange(compressor: Compressor, shard: int, workers: int) -> str:
    """What a hierarchical exchange does on the slow axis: 'gather' or 'ring', by bytes."""
    sent = lambda name: sum(h.sent_bytes for h in exchange_hops(name, compressor, shard, workers))
    return min(_possible(compressor, ("gather", "ring"), sent), key=sent)


def exchange_bytes(
    exchange: str,
    compressor: Compressor,
    size: int,
    workers: Workers,
    bucket_bytes: int | None = None,
) -> float:
    """Bytes that one worker sends in an exchange; arguments as `exchange_mean`."""
    exchange = resolve_exchange(exchange, compressor, size, workers)
    n = product(workers)
    total = 0.0
    for bucket in buckets(exchange, size, n, bucket_bytes):
        # a chunk of 'two_phase' is as wide as the bucket, however much of it is padding
        elements = bucket.width * n if exchange == "two_phase" else bucket.size
        hops = exchange_hops(exchange, compressor, elements, workers)
        total += sum(hop.sent_bytes for hop in hops)
    return total


def choose_exchange(
    compressor: Compressor,
    size: int,
    workers: Workers,
    *,
    latency: float | tuple[float, float] = LATENCY,
    bandwidth: float | tuple[float, float] = BANDWIDTH,
    candidates: Sequence[str] = ("gather", "two_phase", "ring", "dense"),
) -> str:
    """The exchange with the least predicted time; on a tie the first of the candidates.

    Time to encode and decode is not part of it, nor is what coding partial results again costs in
    accuracy ('two_phase' and 'ring' do that, 'gather' does not).

    Args:
      compressor: the codec.
      size: elements of the vector.
      workers: number of workers; (fast, slow) where 'hierarchical' is a candidate.
      latency: seconds a message; (fast, slow) for two kinds of links, of which every exchange but
        the hierarchical one uses the slow one.
      bandwidth: bytes a second that a worker sends; one, or (fast, slow).
      candidates: exchanges to choose from. Those that the codec cannot do (top_k(k=...) on a
        chunk of fewer elements) are left out, and for random masks (`rand_k`) those that code
        partial results again, under another mask, unless there are no others.

    Raises:
      ValueError: latency < 0, bandwidth <= 0, or no candidate is possible.

    Example:
      >>> from jaxcomm.collectives import choose_exchange
      >>> from jaxcomm.compressors import sign
      >>> choose_exchange(sign(), 10_000_000, 8), choose_exchange(sign(), 100, 8)
      ('two_phase', 'gather')
    """
    latencies, rates = _pair(latency), _pair(bandwidth)
    if min(latencies) < 0 or min(rates) <= 0:
        raise ValueError(
            f"choose_exchange: needs latency >= 0 and bandwidth > 0, got {latency=}, {bandwidth=}"
        )

    def seconds(exchange):
        total = 0.0
        for hop in exchange_hops(exchange, compressor, size, workers):
            link = hop.axis if exchange == "hierarchical" else 1
            total += hop.messages * latencies[link] + hop.sent_bytes / rates[link]
        return total

    return min(_possible(compressor, candidates, seconds), key=seconds)


def _possible(compressor: Compressor, candidates: Sequence[str], cost) -> list[str]:
    """The candidates that suit the codec and whose cost can be computed, in order."""
    out, reason, suited = [], None, candidates
    if isinstance(compressor, Sparsifier) and compressor.shared_key:
        suited = [name for name in candidates if name not in ("two_phase", "ring")] or candidates
    for name in suited:
        try:
            cost(name)
        except ValueError as error:
            reason = error
        else:
            out.append(name)
    if not out:
        raise ValueError(f"none of the exchanges {tuple(candidates)} is possible: {reason}")
    return out


def resolve_exchange(exchange: str, compressor: Compressor, size: int, workers: Workers) -> str:
    """The exchange that will take place: decides 'auto', and identity is a dense sum."""
    if isinstance(compressor, Identity) and exchange in ("auto", "gather", "two_phase"):
        return "dense"
    if exchange != "auto":
        return exchange
    choice = choose_exchange(compressor, size, workers)
    _log_once(f"exchange='auto': {choice} for {size} elements, {workers} workers, {compressor}")
    return choice


def buckets(exchange: str, size: int, workers: int, bucket_bytes: int | None) -> list[Bucket]:
    """The parts in which a vector is exchanged: ranges of columns of the vector seen as rows.

    'two_phase' has one row a worker: the chunk of each worker, and with it its error memory,
    stays where it is without buckets. All others have one row.
    """
    rows = bucket_rows(exchange, workers)
    length = chunk_size(size, rows)
    step = max(1, length if bucket_bytes is None else bucket_bytes // 4 // rows)
    out = []
    for start in range(0, length, step):
        width = min(step, length - start)
        real = [min(max(size - row * length - start, 0), width) for row in range(rows)]
        out.append(Bucket(start, width, sum(real)))
    return out


def bucket_rows(exchange: str, workers: int) -> int:
    """Rows of the vector for `buckets`."""
    return workers if exchange == "two_phase" else 1


def product(workers: Workers) -> int:
    """All workers."""
    return workers if isinstance(workers, int) else math.prod(workers)


def _pair(value) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    logging.info(message)
