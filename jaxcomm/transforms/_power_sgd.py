r"""PowerSGD: gradients as products of two thin matrices, found by one step of power iteration.

Per matrix M_i = G_i + E_i of worker i, shape (a, b), with rank r and a replicated query Q (b, r):

    P = orth((1/n) sum_i M_i Q)      Q_i = M_i^T P,   Q = (1/n) sum_i Q_i
    u = P Q^T                        E_i <- M_i - P Q_i^T

Q is the next step's query (warm start). A column of Q that comes out zero, as a zero gradient
leaves it, keeps its last query; at r = b, where Q could lose rank for good, it stays the identity.
What Q is exactly orthogonal to is not found again: a block of rows and columns that have entries
nowhere else, if it is zero in a step in which others are not.
The P of all leaves travel in one all-reduce, together with the leaves that stay dense, the Q in a
second: two collectives a step whatever the number of leaves.
The error is the worker's own, M_i - P Q_i^T, as in the authors' package; the paper's M_i - P Q^T
has the same mean, hence the same iterates. What of the workers' differences P does not span stays
in the errors and cancels in their mean, so that at full rank u is the mean whatever the errors.
With `factors`, a codec of our own addition, P and Q travel compressed (the leaves that stay dense
do not), at a rank as many times higher for the same bytes. Then E_i <- M_i - P Q^T, the paper's
error: it also takes in what the codec lost of Q, so that u still telescopes; what it lost of P only
turns the subspace.
The package's rank-1 step divides a stack of same-shape matrices by the norm of the whole stack;
here every matrix is orthogonalised by itself, by QR, which also copes with zero gradients.

Source: Vogels, Karimireddy & Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization" (arXiv 1905.13727), Algorithms 1 and 2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, dense_mean, exchange_mean, flatten
from jaxcomm.collectives.exchange import check_exchange
from jaxcomm.collectives.flatten import leaf_buckets, zeros_like_float32
from jaxcomm.compressors import Compressor
from jaxcomm.compressors._fence import fence
from jaxcomm.compressors.base import require_whole
from jaxcomm.transforms.common import (
    Communication,
    check_compressor,
    check_fixed,
    combine,
    leaf_names,
    log_dense,
    message_key,
    partition,
    zero_count,
)


class PowerSGDState(NamedTuple):
    """Error memories and queries; trees like params, without the leaves that stay dense."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    error: optax.Updates  # float32, like params; per worker: E_i
    query: optax.Updates | None  # float32, (b, r) a leaf; replicated: Q, with warm_start


# exactness of the telescoping sum: no TF32 or bfloat16 passes
_matmul = functools.partial(jnp.matmul, precision="highest")
FEW = 8  # columns


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The matrix (a, b) that an array is seen as, or None below two dimensions.

    Its axes are split where a + b is smallest, at the last such place: a dense kernel (in, out)
    is itself, a convolution (h, w, in, out) becomes (h w in, out).
    """
    splits = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(len(shape) - 1, 0, -1)]
    return min(splits, key=sum) if splits else None


def power_sgd(
    rank: int,
    axis_name: AxisName,
    *,
    min_compression_rate: float = 2.0,
    warm_start: bool = True,
    start_step: int = 0,
    factors: Compressor | None = None,
    exchange: str = "auto",
    bucket_bytes: int | None = None,
    seed: int = 0,
) -> Communication:
    r"""Low-rank mean of the gradients with error feedback.

    .. math:: P = \mathrm{orth}(\tfrac1n\textstyle\sum_i M_i Q),\quad Q_i = M_i^\top P,\quad
      Q = \tfrac1n\sum_i Q_i,\quad u = P Q^\top,\quad E_i \leftarrow M_i - P Q_i^\top

    with :math:`M_i = G_i + E_i`. A worker sends 4 r (a + b) bytes (twice that as a ring) instead of
    4 a b. Exact when the mean of the M_i has rank at most r. Momentum belongs after it:
    `optax.chain(power_sgd(2, axis), optax.sgd(0.1, momentum=0.9))`.

    Args:
      rank: r, of every leaf at most; a leaf takes min(rank, a, b). 1 to 4 in the paper.
      axis_name: name of the worker axis.
      min_compression_rate: leaves with a b < rate * r (a + b) stay dense, as do vectors and
        scalars (logged at start).
      warm_start: start from the last step's Q; without it from a fresh random one.
      start_step: so many steps are dense at first.
      factors: codec of the P and of the Q, such as `quantize(4)`; float32 sums without it.
      exchange: how those travel, see `exchange_mean`.
      bucket_bytes: two collectives for every so many bytes of float32 gradient, of whole leaves,
        so that (with make_train_step's background=True) one bucket travels while others are
        computed; None is two collectives for all.
      seed: seeds the first (or every) Q, the same on all workers, and the codec.

    Returns:
      An Optax transform whose output is the low-rank mean. Inside `optax.inject_hyperparams` name
      rank and min_compression_rate in `static_args`.

    Raises:
      ValueError: rank below 1, a negative rate or start_step, an unknown exchange.
      TypeError: `factors` is no compressor.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxcomm
      >>> tx = optax.chain(jaxcomm.power_sgd(1, "workers"), optax.sgd(0.5))
      >>> loss_fn = lambda w, batch, key: 0.5 * jnp.sum((w - jnp.outer(batch[0], batch[0])) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=2)
      >>> state = step.init(jnp.zeros((8, 8)), jax.random.key(0))
      >>> state, metrics = step(state, jnp.ones((2, 8)))  # a gradient of rank 1 arrives whole
      >>> bool(jnp.allclose(state.params, 0.5))
      True

    References:
      Vogels et al. 2019, PowerSGD (arXiv 1905.13727).
    """
    _check(rank, min_compression_rate, start_step)
    check_exchange(exchange, "power_sgd", bucket_bytes)
    if factors is not None:
        check_compressor(factors, "power_sgd")

    def factor_mean(vector, count, hop):
        """The mean of the workers' P (an even hop) or Q (an odd one), as they travel."""
        if factors is None:
            return dense_mean(vector, axis_name)
        key = jax.random.fold_in(message_key(seed, count, axis_name, factors), hop)
        return exchange_mean(vector, factors, axis_name, key, exchange).mean

    def compressed(leaf) -> bool:
        shape = matrix_shape(jnp.shape(leaf))
        if shape is None or 0 in shape:
            return False
        (a, b), r = shape, min(rank, *shape)
        return a * b >= min_compression_rate * r * (a + b)

    def queries(matrices, count):
        """A fresh Q for every leaf, the same on all workers."""
        key = jax.random.fold_in(jax.random.key(seed), count)
        leaves, treedef = jax.tree.flatten(matrices)
        sides = [matrix_shape(x.shape) or (0, 0) for x in leaves]
        shapes = [(b, min(rank, a, b)) for a, b in sides]

        def draw(i, shape):
            if shape[0] == shape[1]:
                return jnp.eye(shape[0], dtype=jnp.float32)
            return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)

        return jax.tree.unflatten(treedef, [draw(i, shape) for i, shape in enumerate(shapes)])

    def buckets_of(tree):
        """A function for every bucket: of such a tree, its leaves of the bucket."""
        treedef = jax.tree.structure(tree)
        pick = lambda inside, leaf: leaf if inside else optax.MaskedNode()
        chosen = [
            treedef.unflatten([i in run for i in range(treedef.num_leaves)])
            for run in leaf_buckets(tree, bucket_bytes)
        ]
        return [functools.partial(jax.tree.map, pick, inside) for inside in chosen]

    def init_fn(params):
        matrices = partition(params, compressed)[0]
        query = queries(matrices, 0) if warm_start else None
        return PowerSGDState(zero_count(), zeros_like_float32(matrices), query)

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        low, dense = partition(updates, compressed)
        reason = f"less than {min_compression_rate} times smaller at rank {rank}"
        log_dense("power_sgd", leaf_names(dense), reason)
        query = state.query if warm_start else queries(low, state.count)
        total = jax.tree.map(lambda g, e: g.astype(jnp.float32) + e, low, state.error)

        def compress_bucket(number, mine):
            mine_low, mine_dense = mine(total), mine(dense)
            means = lambda vector, hop: factor_mean(vector, state.count, 2 * number + hop)
            (mean, error, new), mean_dense = _low_rank_mean(
                mine_low, mine(query), mine_dense if factors is None else [], means, factors is None
            )
            if factors is not None:
                vector, unflatten = flatten(mine_dense)
                mean_dense = unflatten(dense_mean(vector, axis_name), jnp.float32)
            return combine(mean, mean_dense), error, new

        def compress():
            found = [compress_bucket(i, mine) for i, mine in enumerate(buckets_of(updates))]
            return tuple(functools.reduce(combine, parts) for parts in zip(*found))

        def all_dense():
            vector, unflatten = flatten((low, dense))
            means = unflatten(dense_mean(vector, axis_name), jnp.float32)
            return combine(*means), state.error, query

        if isinstance(start_step, int) and start_step == 0:
            mean, error, query = compress()
        else:
            mean, error, query = cond(state.count < start_step, all_dense, compress)
        mean = jax.tree.map(lambda u, g: u.astype(g.dtype), mean, updates)
        return mean, PowerSGDState(state.count + 1, error, query if warm_start else None)

    return Communication(init_fn, update_fn)


def _low_rank_mean(total, query, dense, mean_fn, own_error: bool):
    """Two means: ((low-rank means, this worker's errors, new queries), dense means).

    With `own_error` the errors need no second mean: they are computed before it, so that the link
    is idle between the two, where a link that lets bursts through gathers credit.
    """
    leaves, treedef = jax.tree.flatten(total)
    groups: dict[tuple, list[int]] = {}  # leaves of one matrix shape are one batch
    for i, leaf in enumerate(leaves):
        groups.setdefault(matrix_shape(leaf.shape), []).append(i)
    ms = [jnp.stack([leaves[i].reshape(s) for i in members]) for s, members in groups.items()]
    old = jax.tree.leaves(query)
    old = [jnp.stack([old[i] for i in members]) for members in groups.values()]

    vector, unflatten = flatten(([_matmul(m, q) for m, q in zip(ms, old)], dense))
    ps, dense = unflatten(mean_fn(vector, hop=0), jnp.float32)
    ps = [jnp.linalg.qr(p)[0] for p in ps]
    own = [_matmul(m.mT, p) for m, p in zip(ms, ps)]

    def ungroup(stacks):
        parts = [x for stack in stacks for x in stack]
        out = dict(zip((i for members in groups.values() for i in members), parts))
        return [out[i] for i in range(len(leaves))]

    def low_rank(ps, qs):
        pairs = zip(ungroup(ps), ungroup(qs), leaves)
        return [_product(p, q).reshape(leaf.shape) for p, q, leaf in pairs]

    rest = lambda parts: [leaf - part for leaf, part in zip(leaves, parts)]
    vector, unflatten = flatten(own)
    error = None
    if own_error:
        vector, error = fence((vector, rest(low_rank(ps, own))))
    # fenced: fused into every product, a codec's decoding was done anew for each element
    qs = unflatten(fence(mean_fn(vector, hop=1))) if own else []
    mean = low_rank(ps, qs)
    error = rest(mean) if error is None else error
    query = ungroup(map(_next_query, old, qs))
    return tuple(map(treedef.unflatten, (mean, error, query))), dense


def _next_query(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new Q, (..., b, r); a column of zeros stays the old one, as does all of Q at r = b."""
    if new.shape[-1] == new.shape[-2]:
        return old
    return jnp.where(jnp.any(new != 0, axis=-2, keepdims=True), new, old)


def _product(p: jax.Array, q: jax.Array) -> jax.Array:
    """P Q^T; of few columns as a sum of outer products, which XLA fuses with what it is used in."""
    rank = p.shape[1]
    if not 0 < rank <= FEW:
        return _matmul(p, q.mT)
    outer = (p[:, k, None] * q.mT[k] for k in range(rank))
    return functools.reduce(jnp.add, outer)


def _check(rank, min_compression_rate, start_step) -> None:
    check_fixed(rank, "rank", "power_sgd")
    check_fixed(min_compression_rate, "min_compression_rate", "power_sgd")
    require_whole("power_sgd: rank", rank, 1)
    if min_compression_rate < 0:
        raise ValueError(
            f"power_sgd: min_compression_rate must not be negative, got {min_compression_rate}"
        )
    if isinstance(start_step, int) and start_step < 0:
        raise ValueError(f"power_sgd: start_step must not be negative, got {start_step}")
