"""Small sums and gathers in one or two rounds: each worker sends to each other worker.

Gloo's collectives go round a ring, n-1 messages one after another for a gather and 2 (n-1) for a
sum. Here a gather is an all-to-all of n copies, and a sum a reduce-scatter (an all-to-all and a
local sum) and such a gather. They send the same bytes, with a latency of 1 and 2 messages (a sum of
a few elements is one gather, and a local sum). For large messages a ring is better: between two
hosts Gloo sends and receives in turn. A sum's terms are added in the order of the workers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis, primitives
from jaxcomm.collectives.axis import AxisName
from jaxcomm.collectives.means import split_chunks

LARGEST = 32_768  # bytes from one worker to another
MOST = 16  # workers
FEW = 64  # elements whose sum is one gather


def worth_it(op: str, size_bytes: int, workers: int) -> bool:
    """Whether an 'all-gather' or 'all-reduce' of an operand of so many bytes is small enough."""
    share = {"all-gather": 1, "all-reduce": workers}.get(op, 0)
    return workers <= MOST and size_bytes <= share * LARGEST


def direct_gather(
    x: jax.Array, axis_name: AxisName, all_to_all: Callable = primitives.all_to_all
) -> jax.Array:
    """Everyone's x, replicated: (...) -> (n, ...), by an all-to-all."""
    copies = jnp.broadcast_to(x, (axis.size(axis_name), *x.shape))
    return axis.equal(all_to_all(copies, axis_name), axis_name)


def direct_sum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sum over the workers of a float32 array of any shape, replicated."""
    if x.size <= FEW:
        return primitives.sum_rows(direct_gather(x, axis_name))
    rows = split_chunks(x.reshape(-1), axis.size(axis_name))
    mine = primitives.scatter_sum(rows, axis_name)
    return direct_gather(mine, axis_name).reshape(-1)[: x.size].reshape(x.shape)
