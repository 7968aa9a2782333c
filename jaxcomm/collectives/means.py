"""Means of vectors over the worker axis, dense and compressed.

dense      psum of float32:                         2 (n-1)/n * 4 d bytes sent by a worker
gather     all-gather payloads, decode, average:    (n-1) * payload(d)
two-phase  all-to-all of packed chunks, average,
           compress again, all-gather:              (n-1)/n * payload(d) + (n-1) * payload(d/n)

Two-phase is the scheme of 1-bit Adam (Tang et al. 2021, arXiv 2102.02888): for a codec of constant
rate it costs 2 (n-1)/n payloads whatever n, where gather costs n-1. Gather is exact in the sense
that the result is the mean of the decoded messages; two-phase compresses that mean once more, and
feeds the second error back when the caller keeps it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis, primitives
from jaxcomm.collectives.axis import AxisName
from jaxcomm.collectives.flatten import check_floating, flatten, leaf_buckets
from jaxcomm.compressors.base import Compressor, Payload


class Exchanged(NamedTuple):
    """What a compressed mean gives back."""

    mean: jax.Array  # shape=(d,), replicated: the result
    sent: jax.Array  # shape=(d,), per worker: what this worker's message decodes to
    server_error: jax.Array | None = None  # shape=(ceil(d/n),), per worker: two-phase only


def mean(tree, axis_name: AxisName, bucket_bytes: int | None = None):
    """Dense mean of a pytree over the workers: one float32 sum, leaf dtypes kept.

    With `bucket_bytes` it is a sum for every so many bytes of float32, of whole leaves. Simulated
    workers share a memory: each leaf is summed where it is, and nothing is joined.
    """
    check_floating(tree)
    leaves, treedef = jax.tree.flatten(tree)
    if all(axis.simulated(x, axis_name) for x in leaves):
        one = lambda x: dense_mean(x.astype(jnp.float32), axis_name).astype(x.dtype)
        return jax.tree.map(one, tree)
    means = []
    for run in leaf_buckets(tree, bucket_bytes):
        vector, unflatten = flatten([leaves[i] for i in run])
        means += unflatten(dense_mean(vector, axis_name))
    return jax.tree.unflatten(treedef, means)


def dense_mean(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Dense mean of a float32 array over the workers."""
    return primitives.all_sum(x, axis_name) / axis.size(axis_name)


def gather_payloads(payload: Payload, axis_name: AxisName) -> Payload:
    """Everyone's payload, replicated; leaves get a leading axis n."""
    return {part: primitives.all_gather(x, axis_name, part) for part, x in payload.items()}


def gather_mean(
    x: jax.Array,
    compressor: Compressor,
    axis_name: AxisName,
    key: jax.Array | None = None,
    coefficients: jax.Array | None = None,
) -> Exchanged:
    """(1/n) sum_i coefficient_i C(x_i): the mean of the workers' decoded messages.

    Args:
      x: float32 vector of shape (d,), this worker's.
      compressor: the codec.
      axis_name: the worker axis.
      key: PRNG key of this worker's message, for random codecs.
      coefficients: shape (n,), replicated, or None for ones.
    """
    if x.size == 0:
        return Exchanged(dense_mean(x, axis_name), x)
    payload = compressor.encode(x, key)
    total = compressor.decode_sum(gather_payloads(payload, axis_name), x.size, coefficients)
    return Exchanged(total / axis.size(axis_name), compressor.decode(payload, x.size))


def chunk_size(size: int, workers: int) -> int:
    """Elements in each worker's chunk of a vector of `size`: ceil(size / workers)."""
    return -(-size // workers)


def split_chunks(x: jax.Array, workers: int, length: int | None = None) -> jax.Array:
    """The vector as one row of `length` elements a worker, zeros after its end."""
    length = chunk_size(x.size, workers) if length is None else length
    return jnp.pad(x, (0, workers * length - x.size)).reshape(workers, length)


def encode_chunk(
    compressor: Compressor, x: jax.Array, key: jax.Array | None, start: jax.Array, size: int
) -> tuple[jax.Array, Payload]:
    """Codes a chunk that begins at `start` of a vector of `size`.

    Returns:
      x with its padding set to zero, and the payload. Padding carries no error from hop to hop
      and has no weight in the scale.
    """
    count = jnp.clip(size - start, 0, x.size)
    x = jnp.where(jnp.arange(x.size) < count, x, 0.0)
    return x, {k: v[0] for k, v in compressor.encode_chunks(x[None], key, size=count).items()}


def decode_chunks(compressor: Compressor, payloads: Payload, length: int) -> jax.Array:
    """(n, length) from n stacked payloads of chunks."""
    return jax.vmap(lambda payload: compressor.decode(payload, length))(payloads)


def two_phase_mean(
    x: jax.Array,
    compressor: Compressor,
    axis_name: AxisName,
    key: jax.Array | None = None,
    server_error: jax.Array | None = None,
    length: int | None = None,
) -> Exchanged:
    """Mean by chunks: worker r averages chunk r of everyone, and sends it on compressed.

    A codec sees one chunk at a time: `top_k(0.01)` keeps 1 % of each chunk, so that every chunk
    gets its k/n, and the mean of chunk r, which may have up to n k/n non-zeros, goes out with k/n.
    `top_k(k=...)` keeps k of each chunk, n k in all; give a fraction.

    Args:
      x: float32 vector of shape (d,); any d, the last chunks are padded.
      compressor: codec of both hops.
      axis_name: the worker axis.
      key: PRNG key of this worker's message, for random codecs.
      server_error: shape (ceil(d/n),), this worker's error memory of the second hop, or None.
      length: elements in a chunk, if not ceil(d/n).
    """
    n, size = axis.size(axis_name), x.size
    if size == 0:
        return Exchanged(dense_mean(x, axis_name), x, server_error)
    chunks = split_chunks(x, n, length)
    length = chunks.shape[1]
    payload = compressor.encode_chunks(chunks, key, size=size)
    sent = decode_chunks(compressor, payload, length).reshape(-1)[:size]
    received = {k: primitives.all_to_all(v, axis_name, k) for k, v in payload.items()}
    mine = compressor.decode_sum(received, length) / n
    if server_error is not None:
        mine = mine + server_error
    second_key = None if key is None else jax.random.fold_in(key, 1)
    start = axis.index(axis_name) * length
    mine, second = encode_chunk(compressor, mine, second_key, start, size)
    if server_error is not None:
        valid = start + jnp.arange(length) < size
        server_error = jnp.where(valid, mine - compressor.decode(second, length), 0.0)
    result = decode_chunks(compressor, gather_payloads(second, axis_name), length)
    return Exchanged(result.reshape(-1)[:size], sent, server_error)
