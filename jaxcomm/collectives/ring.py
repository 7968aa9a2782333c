"""Ring all-reduce of compressed chunks that leaves every replica with the same bits.

The vector is cut into n chunks. Worker r, with p the partial sum it holds and C the codec:

    hop k = 0 .. n-2     send C(p) of chunk r - k, receive chunk r - k - 1, p <- received + own
    then                 p is the sum of chunk r + 1, which r owns: coded once, its own copy
                         replaced by the decoded value, and the codes go round unchanged
    all                  mean = decoded / n

Each hop quantizes afresh and adds in float32. Without "replace" the owner keeps p where the others
have decode(C(p)), and replicas drift apart; with it, and codes forwarded verbatim, they are equal
to the last bit (Prime Collective Communications Library, arXiv 2505.14065). All chunks, the owned
one included, are decoded by one operation at the end: a compiler may round the same formula
differently in two places. A worker sends 2 (n-1) payload(d/n) bytes.

Every worker codes every chunk exactly once, so the loss of each coding can go to the memory of the
worker that made it: with sent_i = x_i - (its losses), (1/n) sum_i sent_i is the mean that all get,
and error feedback needs no second memory.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.collectives import axis, primitives
from jaxcomm.collectives.axis import AxisName
from jaxcomm.collectives.means import (
    Exchanged,
    decode_chunks,
    dense_mean,
    encode_chunk,
    gather_payloads,
    split_chunks,
)
from jaxcomm.compressors.base import Compressor, Payload

FORWARDS = ("gather", "ring")


def ring_mean(
    x: jax.Array,
    compressor: Compressor,
    axis_name: AxisName,
    key: jax.Array | None = None,
    *,
    forward: str = "gather",
    replace: bool = True,
) -> Exchanged:
    """Mean by a ring of compressed partial sums; the same bits on every worker.

    The codes of the owned chunks go round by an all-gather, which is the same bytes as passing
    them on n-1 times, and whose result JAX types as replicated: that is the proof that the workers
    agree. `forward='ring'` passes them on hop by hop; the values are equal too, but JAX cannot
    know that, and types them as varying.

    Args:
      x: float32 vector of shape (d,), this worker's; any d, chunks may be short or empty.
      compressor: codec of every hop; it sees one chunk at a time (see `two_phase_mean`).
      axis_name: the worker axis; a tuple of axes is one ring.
      key: PRNG key of this worker's message, for random codecs.
      forward: 'gather' or 'ring'.
      replace: False lets the owner keep its uncoded chunk: replicas then differ, for experiments.

    Returns:
      The mean, replicated unless forward='ring' or replace=False; and what this worker sent,
      x minus the losses of its own codings.

    Raises:
      ValueError: an unknown `forward`.
    """
    if forward not in FORWARDS:
        raise ValueError(f"ring_mean: forward must be one of {FORWARDS}, got {forward!r}")
    if x.size == 0:
        return Exchanged(dense_mean(x, axis_name), x)
    n, me, size = axis.size(axis_name), axis.index(axis_name), x.size
    chunks = split_chunks(x, n)
    length = chunks.shape[1]

    def code(partial, hop, errors):
        """Codes the partial sum of chunk `me - hop`, and keeps the loss at that place."""
        chunk = (me - hop) % n
        own_key = None if key is None else jax.random.fold_in(key, hop)
        partial, payload = encode_chunk(compressor, partial, own_key, chunk * length, size)
        return payload, errors.at[chunk].set(partial - compressor.decode(payload, length))

    def reduce(carry, hop):
        partial, errors = carry
        payload, errors = code(partial, hop, errors)
        received = compressor.decode(_shift(payload, axis_name), length)
        return (received + chunks[(me - hop - 1) % n], errors), None

    start = axis.varying((chunks[me], jnp.zeros_like(chunks)), axis_name)
    (total, errors), _ = lax.scan(reduce, start, jnp.arange(n - 1))
    payload, errors = code(total, n - 1, errors)
    if forward == "gather":  # row i is chunk i + 1
        codes = {k: jnp.roll(v, 1, 0) for k, v in gather_payloads(payload, axis_name).items()}
    else:
        codes = _relay(payload, axis_name)
    result = decode_chunks(compressor, codes, length)
    if not replace:
        result = axis.varying(result, axis_name).at[(me + 1) % n].set(total)
    flat = lambda rows: rows.reshape(-1)[:size]
    return Exchanged(flat(result) / n, x - flat(errors))


def _shift(payload: Payload, axis_name: AxisName) -> Payload:
    return {part: primitives.shift(x, axis_name, 1, part) for part, x in payload.items()}


def _relay(payload: Payload, axis_name: AxisName) -> Payload:
    """Everyone's codes in the order of the chunks, each passed on verbatim n-1 times."""
    n, owned = axis.size(axis_name), axis.index(axis_name) + 1

    def store(rows, payload, chunk):
        return {k: v.at[chunk % n].set(payload[k]) for k, v in rows.items()}

    def forward(carry, hop):
        payload, rows = carry
        payload = _shift(payload, axis_name)
        return (payload, store(rows, payload, owned - 1 - hop)), None

    empty = {k: jnp.zeros((n, *v.shape), v.dtype) for k, v in payload.items()}
    start = axis.varying((payload, store(empty, payload, owned)), axis_name)
    return lax.scan(forward, start, jnp.arange(n - 1))[0][1]
