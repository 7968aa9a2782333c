"""A pytree as one float32 vector and back: a step costs a few collectives, not one per leaf."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def flatten(tree) -> tuple[jax.Array, Callable]:
    """Concatenates the leaves, in tree order, into one float32 vector of shape (d,).

    Returns:
      the vector, and `unflatten(vector, dtype=None)`, which gives the tree back: leaves have the
      original shapes and the original dtypes, or `dtype` where that is given.

    Raises:
      TypeError: a leaf is not a real floating-point array.
    """
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for path, leaf in zip(jax.tree.leaves_with_path(tree), leaves):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"only floating-point leaves can be exchanged, got {leaf.dtype} at "
                f"{jax.tree_util.keystr(path[0])}; leave it out with optax.masked"
            )
    shapes = [(leaf.shape, leaf.dtype, leaf.size) for leaf in leaves]
    flat = [leaf.astype(jnp.float32).reshape(-1) for leaf in leaves]
    vector = jnp.concatenate(flat) if flat else jnp.zeros((0,), jnp.float32)

    def unflatten(vector: jax.Array, dtype=None):
        parts, start = [], 0
        for shape, own, length in shapes:
            part = jax.lax.slice(vector, (start,), (start + length,))
            parts.append(part.reshape(shape).astype(dtype or own))
            start += length
        return jax.tree.unflatten(treedef, parts)

    return vector, unflatten


def tree_size(tree) -> int:
    """Number of elements in all leaves."""
    return sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(tree))


def zeros_like_float32(tree):
    """A tree of float32 zeros with the leaves' shapes: a memory."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), tree)
