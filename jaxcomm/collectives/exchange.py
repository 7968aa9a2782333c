"""One entry point for every mean of compressed vectors: by which way, and in how many buckets."""

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis
from jaxcomm.collectives.axis import AxisName
from jaxcomm.collectives.cost import (
    EXCHANGES,
    bucket_rows,
    buckets,
    resolve_exchange,
    slow_exchange,
)
from jaxcomm.collectives.hierarchical import hierarchical_mean
from jaxcomm.collectives.means import (
    Exchanged,
    chunk_size,
    dense_mean,
    gather_mean,
    split_chunks,
    two_phase_mean,
)
from jaxcomm.collectives.ring import ring_mean
from jaxcomm.compressors.base import Compressor

SCOPE = "jaxcomm.exchange."  # the name scope that carries the choice into the program


def check_exchange(exchange: str, where: str, bucket_bytes: int | None = None) -> None:
    """Raises a ValueError for an unknown exchange or a bucket smaller than a float."""
    if exchange not in EXCHANGES:
        raise ValueError(f"{where}: exchange must be one of {EXCHANGES}, got {exchange!r}")
    check_bucket(bucket_bytes, where)


def check_bucket(bucket_bytes: int | None, where: str) -> None:
    """Raises a ValueError for a bucket smaller than a float."""
    if bucket_bytes is not None and bucket_bytes < 4:
        raise ValueError(
            f"{where}: bucket_bytes must be at least 4 (one float32) or None, got {bucket_bytes}"
        )


def server_error_size(
    exchange: str, compressor: Compressor, size: int, axis_name: AxisName
) -> int | None:
    """Elements of a worker's second error memory in `exchange_mean`, None where it needs none."""
    chosen = resolve_exchange(exchange, compressor, size, _workers(axis_name))
    return chunk_size(size, axis.size(axis_name)) if chosen == "two_phase" else None


def exchange_mean(
    x: jax.Array,
    compressor: Compressor,
    axis_name: AxisName,
    key: jax.Array | None = None,
    exchange: str = "gather",
    server_error: jax.Array | None = None,
    bucket_bytes: int | None = None,
) -> Exchanged:
    """The mean of the workers' vectors by the named exchange; replicated, same bits everywhere.

    The exchange that takes place is a name scope of the program (`jaxcomm.exchange.<name>`).

    Args:
      x: float32 vector of shape (d,), this worker's.
      compressor: the codec; identity by 'gather', 'two_phase' or 'auto' is one dense sum.
      axis_name: the worker axis; (fast, slow) for 'hierarchical'.
      key: PRNG key of this worker's message, for random codecs.
      exchange: 'gather', 'two_phase', 'ring', 'hierarchical'; 'dense', which sends float32
        whatever the codec; or 'auto', the least predicted time at 1 Gbit/s (`choose_exchange`).
      server_error: shape (ceil(d/n),): error memory of the second hop of 'two_phase', or None. It
        belongs to positions of the vector, whatever the buckets.
      bucket_bytes: exchange the vector in parts of so many bytes of float32, the last one short.
        The codec sees one part at a time: it scales by, and keeps k of, each.

    Raises:
      ValueError: an unknown exchange, or a hierarchical one without a pair of axes.
    """
    check_exchange(exchange, "exchange_mean", bucket_bytes)
    workers = _workers(axis_name)
    name = resolve_exchange(exchange, compressor, x.size, workers)
    if name == "hierarchical" and len(workers) != 2:
        raise ValueError(
            f"exchange='hierarchical' needs axis_name=(fast axis, slow axis), got {axis_name!r}"
        )

    def run(x, key, server_error, length=None) -> Exchanged:
        if name == "two_phase":
            return two_phase_mean(x, compressor, axis_name, key, server_error, length)
        if name == "dense":
            return Exchanged(dense_mean(x, axis_name), x)
        if name == "hierarchical":
            return _hierarchical(x, compressor, axis_name, key)
        return (ring_mean if name == "ring" else gather_mean)(x, compressor, axis_name, key)

    memory = server_error if name == "two_phase" else None
    rows = bucket_rows(name, axis.size(axis_name))
    parts = buckets(name, x.size, axis.size(axis_name), bucket_bytes)
    with jax.named_scope(SCOPE + name):
        if len(parts) <= 1:
            result = run(x, key, memory)
        else:
            result = _by_bucket(run, rows, parts, x, key, memory)
    return result if name == "two_phase" else result._replace(server_error=server_error)


def _hierarchical(x, compressor, axis_name, key) -> Exchanged:
    fast, slow = _workers(axis_name)
    name = slow_exchange(compressor, chunk_size(x.size, fast), slow) if x.size else "gather"
    across = lambda *args: exchange_mean(*args, exchange=name)
    return hierarchical_mean(x, compressor, axis_name, key, across)


def _by_bucket(run, rows: int, parts, x, key, server_error) -> Exchanged:
    """`run` on ranges of columns of the vector seen as rows, put together again."""
    grid = split_chunks(x, rows)
    means, sents, errors = [], [], []
    for i, (start, width, size) in enumerate(parts):
        part = grid[:, start : start + width].reshape(-1)[:size]
        own_key = None if key is None else jax.random.fold_in(key, i)
        memory = None if server_error is None else server_error[start : start + width]
        result = run(part, own_key, memory, width)
        means.append(split_chunks(result.mean, rows, width))
        sents.append(split_chunks(result.sent, rows, width))
        errors.append(result.server_error)
    join = lambda columns: jnp.concatenate(columns, axis=1).reshape(-1)[: x.size]
    error = None if server_error is None else jnp.concatenate(errors)
    return Exchanged(join(means), join(sents), error)


def _workers(axis_name: AxisName) -> tuple[int, ...]:
    return tuple(axis.size(name) for name in axis.axes(axis_name))
