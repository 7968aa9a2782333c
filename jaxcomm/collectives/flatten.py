"""A pytree as one float32 vector and back: a step costs a few collectives, not one per leaf.

XLA on CPU makes a kernel of every slice of a vector, and compiles two of them as one only if they
cut at the same place. So that a tree of 10,000 leaves compiles at all, many leaves are joined and
cut in groups (of more than 16,384 in groups of groups): equal groups share their kernels. A fence
keeps XLA from merging the levels.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomm.compressors._fence import fence

DIRECT = 128  # leaves that are joined and cut at once
GROUP = 64  # of more leaves, at least


def flatten(tree) -> tuple[jax.Array, Callable]:
    """Concatenates the leaves, in tree order, into one float32 vector of shape (d,).

    Returns:
      the vector (of no elements it is a constant, the same on all workers), and
      `unflatten(vector, dtype=None)`, which gives the tree back: leaves have the original shapes
      and the original dtypes, or `dtype` where that is given.

    Raises:
      TypeError: a leaf is not a real floating-point array.
    """
    check_floating(tree)
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    own = [(leaf.shape, leaf.dtype) for leaf in leaves]
    sizes = [math.prod(shape) for shape, _ in own]
    flat = [lax.reshape(leaf.astype(jnp.float32), (n,)) for leaf, n in zip(leaves, sizes)]
    vector = _join(flat) if any(sizes) else jnp.zeros((0,), jnp.float32)

    def unflatten(vector: jax.Array, dtype=None):
        parts = _cut(vector, sizes) if own else []
        return jax.tree.unflatten(
            treedef,
            [lax.reshape(x, shape).astype(dtype or kind) for x, (shape, kind) in zip(parts, own)],
        )

    return vector, unflatten


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    """The parts as one vector."""
    if len(parts) > DIRECT:
        parts = [fence(_join(group)) for group in _groups(parts)]
    return jnp.concatenate(parts)


def _cut(vector: jax.Array, sizes: Sequence[int]) -> Sequence[jax.Array]:
    """The inverse of `_join`."""
    if len(sizes) <= DIRECT:
        return lax.split(vector, sizes)
    groups = _groups(sizes)
    parts = lax.split(vector, [sum(group) for group in groups])
    return [x for part, group in zip(parts, groups) for x in _cut(fence(part), group)]


def _groups(items: Sequence) -> list[Sequence]:
    """At most DIRECT groups of equal length, for few levels: each is a pass over the memory."""
    length = GROUP
    while length * DIRECT < len(items):
        length *= 2
    return [items[i : i + length] for i in range(0, len(items), length)]


def leaf_buckets(tree, bucket_bytes: int | None) -> list[list[int]]:
    """Numbers of the leaves, in tree order, in runs of about so many bytes of float32 each.

    A run ends with the leaf that fills it; None is one run of all.
    """
    runs, filled = [[]], 0
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if bucket_bytes is not None and filled >= bucket_bytes:
            runs, filled = [*runs, []], 0
        runs[-1].append(i)
        filled += 4 * math.prod(jnp.shape(leaf))
    return runs


def tree_size(tree) -> int:
    """Number of elements in all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def zeros_like_float32(tree):
    """A tree of float32 zeros with the leaves' shapes: a memory."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), tree)


def check_floating(tree) -> None:
    """Raises the TypeError of `flatten`, which names the leaf."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"only floating-point leaves can be exchanged, got {dtype} at "
                f"{jax.tree_util.keystr(path)}; leave it out with optax.masked"
            )
