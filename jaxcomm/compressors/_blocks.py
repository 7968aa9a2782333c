"""Blocks of a vector without padding it: the whole blocks as rows, then a short last row.

Padding would cost a copy, and padded zeros would enter minima and means.
"""

import jax
import jax.numpy as jnp


def rows(x: jax.Array, block_size: int | None) -> list[jax.Array]:
    """One or two arrays (n, block): whole blocks and, if there is one, the short last block."""
    size = x.shape[0]
    block = block_size or max(size, 1)
    whole = size // block * block
    pieces = []
    if whole or not size:
        pieces.append(x[:whole].reshape(-1, block))
    if whole < size:
        pieces.append(x[whole:].reshape(1, -1))
    return pieces


def columns(per_block: jax.Array, size: int, block_size: int | None) -> list[jax.Array]:
    """The same split of a vector with one entry a block, as (n, 1)."""
    whole = size // (block_size or max(size, 1))
    pieces = []
    if whole or not size:
        pieces.append(per_block[:whole, None])
    if whole < per_block.shape[0]:
        pieces.append(per_block[whole:, None])
    return pieces


def join(pieces: list[jax.Array]) -> jax.Array:
    """The pieces as one vector again."""
    return (
        pieces[0].reshape(-1)
        if len(pieces) == 1
        else jnp.concatenate([piece.reshape(-1) for piece in pieces])
    )


def widest(size: int, block_size: int | None) -> int:
    """Elements of the largest block, at least 1."""
    return max(1, min(block_size or size, size))


def check_block_size(name: str, block_size: int | None) -> None:
    if block_size is not None and block_size < 1:
        raise ValueError(f"{name}: block_size must be at least 1 or None, got {block_size}")
