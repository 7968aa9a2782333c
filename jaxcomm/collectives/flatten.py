"""A pytree as one float32 vector and back: a step costs a few collectives, not one per leaf."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


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
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        _refuse(tree)
    own = [(leaf.shape, leaf.dtype) for leaf in leaves]
    sizes = [math.prod(shape) for shape, _ in own]
    flat = [lax.reshape(leaf.astype(jnp.float32), (n,)) for leaf, n in zip(leaves, sizes)]
    vector = jnp.concatenate(flat) if flat else jnp.zeros((0,), jnp.float32)

    def unflatten(vector: jax.Array, dtype=None):
        parts = lax.split(vector, sizes) if own else []
        return jax.tree.unflatten(
            treedef,
            [lax.reshape(x, shape).astype(dtype or kind) for x, (shape, kind) in zip(parts, own)],
        )

    return vector, unflatten


def tree_size(tree) -> int:
    """Number of elements in all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def zeros_like_float32(tree):
    """A tree of float32 zeros with the leaves' shapes: a memory."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), tree)


def _refuse(tree) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"only floating-point leaves can be exchanged, got {dtype} at "
                f"{jax.tree_util.keystr(path)}; leave it out with optax.masked"
            )
