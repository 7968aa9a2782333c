"""A large all-to-all in rounds, in each of which a worker sends to one and hears from another.

Two hosts share one connection of Gloo's, and who is late answers only behind what it sends itself:
where two exchange large messages at a time, one may wait until the other's has arrived, and the
link idles. So a round here is a permutation in which no two workers send to each other. For an odd
number of workers these are the shifts by 1, ..., n-1. For an even one the shift by n/2 is a
mutual exchange, and messages travel in two halves: with m = n-1 workers on a circle and one in its
centre, each round is a shift of the circle in which one arc goes by the centre, such that the arcs
that are replaced form the zigzag 0, m-1, 1, m-2, ..., which then is a round of its own; and the
same for the zigzag backwards. The 2m rounds have every arc twice. Two workers can but swap: they do
it in pieces, so that who waits waits for one of them (and so is a large gather of two, which
round a ring is a swap as well). The bytes are the all-to-all's.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.collectives import axis, primitives
from jaxcomm.collectives.axis import AxisName
from jaxcomm.collectives.direct import LARGEST, MOST

PIECES = 64  # of a swap, at most


def worth_it(size_bytes: int, workers: int) -> bool:
    """Whether an all-to-all of an operand of so many bytes is large enough."""
    return 2 <= workers <= MOST and size_bytes > workers * LARGEST


def all_to_all(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Row j goes to worker j: (n, ...) -> (n, ...), row i of the result came from worker i.

    For n of 2 or more, under shard_map.
    """
    names = axis.axes(axis_name)
    n, me = axis.size(names), axis.index(names)
    if n == 2:
        return _swap(x, names)
    to = permutations(n)
    parts = len(to) // (n - 1)
    sent, received = _tables(n)
    rows = x.reshape(n, -1)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % parts))).reshape(n * parts, -1)
    leaving = axis.varying(rows, names)[jnp.asarray(sent)[me]]
    arrived = [primitives.permute(row, names, ends) for row, ends in zip(leaving, to)]
    found = jnp.stack([*arrived, *leaving[len(to) :]])[jnp.asarray(received)[me]]
    return found.reshape(n, -1)[:, : x.size // n].reshape(x.shape)


def _swap(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    rows, me = axis.varying(x.reshape(2, -1), names), axis.index(names)
    own, leaving = rows[me], rows[1 - me]
    pieces = jnp.array_split(leaving, min(PIECES, leaving.nbytes // LARGEST + 1))
    arrived = jnp.concatenate([primitives.permute(piece, names, (1, 0)) for piece in pieces])
    found = jnp.where(me == 0, jnp.stack([own, arrived]), jnp.stack([arrived, own]))
    return found.reshape(x.shape)


@functools.cache
def permutations(n: int) -> list[list[int]]:
    """For each round and worker the one that it sends to; every pair once (n odd) or twice."""
    if n % 2:
        return [[(i + by) % n for i in range(n)] for by in range(1, n)]
    m, found = n - 1, []
    zigzag = [m - (k + 1) // 2 if k % 2 else k // 2 for k in range(m)]
    for path in (zigzag, zigzag[::-1]):
        for a, b in itertools.pairwise(path):
            found.append([(i + b - a) % m if i != a else m for i in range(m)] + [b])
        after = dict(zip([*path, m], [*path[1:], m, path[0]]))
        found.append([after[i] for i in range(n)])
    return found


@functools.cache
def _tables(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every worker: which of its n * parts rows leave in which round (last those that stay),
    and where of what arrived (last what stayed) the rows of the result are."""
    to = permutations(n)
    parts = len(to) // (n - 1)
    used = np.zeros((n, n), int)
    sent, received = np.zeros((n, len(to) + parts), int), np.zeros((n, n * parts), int)
    for k, ends in enumerate(to):
        for i, j in enumerate(ends):
            sent[i, k] = j * parts + used[i, j]
            received[j, i * parts + used[i, j]] = k
            used[i, j] += 1
    for i in range(n):
        sent[i, len(to) :] = range(i * parts, (i + 1) * parts)
        received[i, i * parts : (i + 1) * parts] = range(len(to), len(to) + parts)
    return sent, received
