"""The programs of a pipelined mean: buckets cut, coded, sent as one message, put together.

Programs with collectives have nothing else in them, and the others none, so that two threads can
run them at the same time (`jaxcomm.training.pipeline`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomm.collectives import axis, primitives
from jaxcomm.collectives.cost import bucket_rows, buckets
from jaxcomm.collectives.flatten import flatten
from jaxcomm.collectives.means import chunk_size, decode_chunks, encode_chunk
from jaxcomm.compressors.base import Compressor, Payload
from jaxcomm.training.workers import Place, Workers

OWN, SHARED = Place.PER_WORKER, Place.REPLICATED


class Setting(NamedTuple):
    """Who exchanges what, how, where."""

    codec: Compressor
    exchange: str  # 'two_phase' or 'gather'
    workers: Workers  # on the computing devices
    wire: Workers  # the same on the devices of the transfers

    @property
    def rows(self) -> int:
        """Rows of the vector of which a bucket is some columns."""
        return bucket_rows(self.exchange, self.workers.count)


class Plan:
    """What it takes to average trees of one structure: cut, step by step, put together."""

    def __init__(self, setting: Setting, bucket_bytes: int, tree):
        workers, rows = setting.workers, setting.rows
        leaves = jax.tree.leaves(tree)
        size = sum(leaf.size for leaf in leaves) // workers.count
        length = chunk_size(size, rows)
        parts = buckets(setting.exchange, size, workers.count, bucket_bytes)
        kinds = {(part.width, part.size) for part in parts}
        steps = {kind: Steps(setting, length, *kind) for kind in kinds}
        number = lambda i: np.int32(i) if len(parts) > 1 else None  # one: the message's own key
        self.parts = [
            (steps[part.width, part.size], (np.int32(part.start), number(i)))
            for i, part in enumerate(parts)
        ]
        self.zeros = workers.jit(lambda: jnp.zeros(rows * length), (), SHARED)
        plain = len(leaves) == 1 and leaves[0].dtype == jnp.float32 and size == rows * length

        def join(tree):
            return jnp.pad(flatten(tree)[0], (0, rows * length - size))

        def split(vector):
            like = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), kind)
            return flatten(like)[1](vector[:size])

        kind = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        self.join = (
            (lambda tree: jax.tree.leaves(tree)[0]) if plain else workers.jit(join, (OWN,), OWN)
        )
        self.split = workers.jit(split, (SHARED,), SHARED, donate=(0,) if plain else ())


class Steps:
    """The programs of all buckets of one shape."""

    def __init__(self, setting: Setting, length: int, width: int, size: int):
        codec, rows, name = setting.codec, setting.rows, setting.workers.axis_name
        one, shapes = setting.exchange == "gather", codec.payload_shapes(width)

        def own(key, number):
            """This worker's key of this bucket."""
            if key is None:
                return None
            key = key if codec.shared_key else jax.random.fold_in(key, axis.index(name))
            return key if number is None else jax.random.fold_in(key, number)

        def encode(vector, key, start, number):
            grid = vector.reshape(rows, length)
            part = lax.dynamic_slice(grid, (jnp.zeros_like(start), start), (rows, width))
            if one:
                return _message(codec.encode(part[0], own(key, number)))
            return _message(codec.encode_chunks(part, own(key, number), size=size))

        def send(message):
            return primitives.all_to_all(message, name, "message")

        def average(received, key, start, number):
            key = own(key, number)
            key = None if key is None else jax.random.fold_in(key, 1)
            total = codec.decode_sum(_payload(received, shapes), width) / rows
            return _message(encode_chunk(codec, total, key, axis.index(name) * width, size)[1])

        def gather(message):
            return primitives.all_gather(message, name, "message")

        def decode(vector, messages, start):
            payloads = _payload(messages, shapes)
            if one:
                part = codec.decode_sum(payloads, width)[None] / axis.size(name)
            else:
                part = decode_chunks(codec, payloads, width)
            grid = vector.reshape(rows, length)
            grid = lax.dynamic_update_slice(grid, part, (jnp.zeros_like(start), start))
            return grid.reshape(-1)

        here, there = setting.workers.jit, setting.wire.jit
        at = (SHARED,) * 3
        self.encode = here(encode, (OWN, *at), OWN)
        self.send = there(send, (OWN,), OWN)
        self.average = here(average, (OWN, *at), OWN)
        self.gather = there(gather, (OWN,), SHARED)
        self.decode = here(decode, (SHARED, SHARED, SHARED), SHARED, donate=(0,))


def _message(payload: Payload) -> jax.Array:
    """The parts as one array: small parts cost a message of their own otherwise."""
    parts = [payload[name] for name in sorted(payload)]
    return parts[0] if len(parts) == 1 else jnp.concatenate([_as_bytes(x) for x in parts], -1)


def _as_bytes(x: jax.Array) -> jax.Array:
    data = lax.bitcast_convert_type(x, jnp.uint8)
    return data if x.dtype.itemsize == 1 else data.reshape(*x.shape[:-1], -1)


def _payload(messages: jax.Array, shapes: dict[str, jax.ShapeDtypeStruct]) -> Payload:
    """The parts, of these shapes, of each of (n, bytes) messages."""
    if len(shapes) == 1:
        return dict.fromkeys(shapes, messages)
    parts, start = {}, 0
    for name, (count, width, dtype) in _layout(shapes):
        data = messages[:, start : start + count * width]
        data = data if width == 1 else data.reshape(len(messages), count, width)
        parts[name] = lax.bitcast_convert_type(data, dtype)
        start += count * width
    return parts


def _layout(shapes: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple]:
    """(name, (elements, bytes of one, dtype)) of the parts of a message."""
    for name in sorted(shapes):
        yield name, (shapes[name].shape[0], shapes[name].dtype.itemsize, shapes[name].dtype)
