"""Blocks of a vector: one number for each, and back to one for each coordinate.

The vector is never padded: whole blocks are reduced as rows, a short last one by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.compressors.base import require_whole


def block_rows(x: jax.Array, block_size: int | None) -> list[jax.Array]:
    """The whole blocks as rows (n, block), and a short last one as (1, rest)."""
    size = x.shape[0]
    block = widest(size, block_size)
    whole = size // block * block
    rows = [x[:whole].reshape(-1, block)]
    return rows if whole == size else [*rows, x[whole:].reshape(1, -1)]


def reduce_blocks(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, block_size: int | None
) -> jax.Array:
    """`fn` of rows (n, block) to (n,), over all blocks: shape (blocks,); no block for size 0."""
    parts = [fn(rows) for rows in block_rows(x, block_size)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def sums(*terms: jax.Array) -> list[jax.Array]:
    """The sums (n,) over the rows of several (n, b) float32 arrays, in one pass.

    XLA fuses it with what computes the terms; for a plain sum it would write them down first.
    """
    n, b = terms[0].shape
    if b % 16 == 0:
        add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys))
        split = [x.reshape(n, 16, b // 16) for x in terms]
        zeros = [jnp.zeros_like(x, shape=()) for x in split]
        terms = jax.lax.reduce(split, zeros, add, (1,))
    return [x.sum(1) for x in terms]


def expand(per_block: jax.Array, size: int, block_size: int | None) -> jax.Array:
    """Each coordinate's block entry, to multiply with: (size,), or (1,) where that is enough.

    XLA fuses this broadcast, reshape and slice into the pass that uses it; `jnp.repeat` and
    concatenated pieces were measured 4 to 100 times slower.
    """
    if per_block.shape[0] <= 1:
        return per_block
    block = widest(size, block_size)
    spread = jnp.broadcast_to(per_block[:, None], (per_block.shape[0], block))
    return spread.reshape(-1)[:size]


def true_counts(shape: tuple[int, int], block_size: int | None, size: int | jax.Array) -> jax.Array:
    """Elements of each block of each of n rows of c that are of a vector of `size`: (n, blocks).

    The rows make up the vector; the rest of them is padding. Without blocks a row is one.
    """
    n, c = shape
    true = jnp.clip(size - jnp.arange(n) * c, 0, c)[:, None]
    if block_size is None:
        return true
    return jnp.clip(true - jnp.arange(0, c, block_size), 0, block_size)


def widest(size: int, block_size: int | None) -> int:
    """Elements of the largest block, at least 1."""
    return max(1, min(block_size or size, size))


def largest(x: jax.Array, block_size: int | None) -> jax.Array:
    """max|x| of each block."""
    return reduce_blocks(lambda rows: jnp.abs(rows).max(1), x, block_size)


def norms(x: jax.Array, block_size: int | None, norm: str) -> jax.Array:
    """`l2` or `max` norm of each block."""
    top = largest(x, block_size)
    if norm == "max":
        return top
    scaled = x * expand(inverse(top), x.shape[0], block_size)  # 1e-25 squared is no float32
    return top * jnp.sqrt(reduce_blocks(lambda rows: (rows * rows).sum(1), scaled, block_size))


def inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 for a scale of 0: such a block decodes to exact zeros."""
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def check_block_size(name: str, block_size: int | None) -> int | None:
    """`block_size` as an int of at least 1, or None."""
    return None if block_size is None else require_whole(f"{name}: block_size", block_size, 1)
