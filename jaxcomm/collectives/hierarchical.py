"""Dense on the fast axis, compressed across the slow one.

With m workers along the fast axis (one host, one pod) and g along the slow one:

    reduce-scatter on the fast axis   worker j holds shard j of the mean of its group
    compressed mean on the slow axis  each worker sends 1/m of the vector, all links at once
    all-gather on the fast axis       the whole mean, in the order of the shards

This is the order of the two-layer HO-ring (PaRO; Wu et al. 2023, "Rethinking Memory and
Communication Costs for Efficient Large Language Model Training", arXiv 2310.06003): a slow link
carries payload(d/m) where a flat exchange sends payload(d) from every worker. As the shards are
numbered by the fast index, no permutation is needed at the end.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis, primitives
from jaxcomm.collectives.means import Exchanged, dense_mean, gather_mean, split_chunks
from jaxcomm.compressors.base import Compressor

DENSE_PART = "dense"  # how the fast hops are named in the program


def hierarchical_mean(
    x: jax.Array,
    compressor: Compressor,
    axes: tuple[str, str],
    key: jax.Array | None = None,
    across: Callable[..., Exchanged] = gather_mean,
) -> Exchanged:
    """Mean over two axes: dense along the fast one, compressed across the slow one.

    The loss of coding shard j of a group's mean goes to the memory of the worker that coded it,
    times m, because the next group mean divides by m: (1/n) sum_i sent_i is the mean that all
    get, and error feedback works as with a flat exchange.

    Args:
      x: float32 vector of shape (d,), this worker's.
      compressor: codec of the slow hop; it sees one shard of ceil(d/m) elements.
      axes: (fast axis, slow axis).
      key: PRNG key of this worker's message, for random codecs.
      across: exchange on the slow axis, `gather_mean` or `ring_mean`.

    Returns:
      The mean, replicated over both axes, and what this worker sent.
    """
    fast, slow = axes
    m, size = axis.size(fast), x.size
    if size == 0:
        return Exchanged(dense_mean(x, (fast, slow)), x)
    rows = split_chunks(x, m)
    shard = primitives.scatter_sum(rows, fast, DENSE_PART) / m
    result = across(shard, compressor, slow, key)
    whole = primitives.all_gather(result.mean, fast, DENSE_PART)
    loss = m * (shard - result.sent)
    errors = axis.varying(jnp.zeros_like(rows), axes).at[axis.index(fast)].set(loss)
    return Exchanged(whole.reshape(-1)[:size], x - errors.reshape(-1)[:size])
