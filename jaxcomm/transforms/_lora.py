r"""Training a small part: LoRA's thin matrices, or any subset of the leaves.

    W = W_0 + (alpha / r) A B,   A (a, r) ~ N(0, 1/a),   B (r, b) = 0 at the start

so that the first forward pass is unchanged and r (a + b) parameters are trained in place of a b.
What is frozen never travels: give `make_train_step` the LoRA tree alone, or keep everything in one
tree and wrap the optimizer in `trainable`. All transforms and sync rules work on either.

A and B are averaged apart; the mean of the products A_i B_i is another matrix (cross terms), which
no pair of rank r can hold in general.

Sources: Hu et al. 2021, "LoRA" (arXiv 2106.09685); Sun et al. 2022, "FedPEFT" (arXiv 2210.01708).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.transforms._power_sgd import matrix_shape
from jaxcomm.transforms.common import Communication, is_masked

Mask = Callable[[optax.Params], optax.Params]


class LoRA(NamedTuple):
    """The two thin factors of one leaf's change."""

    a: jax.Array  # float32, shape=(a, r)
    b: jax.Array  # float32, shape=(r, b)


def leaves_named(pattern: str) -> Mask:
    """A mask: True for the leaves in whose path (such as `layer/kernel`) the regex is found.

    Raises:
      ValueError: (the mask, on a tree) no leaf matches, nor one that `optax.MaskedNode` stands for.
    """

    def mask(params):
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        found = lambda path, _: re.search(pattern, name(path)) is not None
        leaves = jax.tree.leaves_with_path(params, is_leaf=is_masked)
        if leaves and not any(found(*leaf) for leaf in leaves):
            names = ", ".join(name(path) for path, _ in leaves)
            raise ValueError(f"leaves_named: no leaf matches {pattern!r}; there are {names}")
        return jax.tree.map_with_path(found, params)

    return mask


def lora_init(params, rank: int, key: jax.Array, targets: Mask | None = None):
    """LoRA factors for a tree of parameters.

    Args:
      params: the frozen base.
      rank: r of every leaf; at most its smaller side.
      key: PRNG key of the A.
      targets: which leaves, e.g. `leaves_named("attention.*kernel")`; None is all of two or more
        dimensions. Arrays of more than two are seen as matrices, split where a + b is smallest.

    Returns:
      A tree like params with a LoRA at the targets and nothing (`optax.MaskedNode()`) elsewhere:
      the parameters to train.

    Raises:
      ValueError: rank below 1 or above a target's smaller side, or a target without two dimensions.
    """
    if rank < 1:
        raise ValueError(f"lora_init: rank must be at least 1, got {rank}")
    mask = jax.tree.map(lambda x: jnp.ndim(x) > 1, params) if targets is None else targets(params)
    keys = jax.random.split(key, max(len(jax.tree.leaves(params)), 1))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys[: len(jax.tree.leaves(mask))]))

    def factors(path, x, chosen, key):
        if not chosen:
            return optax.MaskedNode()
        shape = matrix_shape(jnp.shape(x))
        if shape is None or rank > min(shape):
            raise ValueError(
                f"lora_init: {jax.tree_util.keystr(path)} of shape {jnp.shape(x)} cannot have "
                f"factors of rank {rank}"
            )
        a = jax.random.normal(key, (shape[0], rank), jnp.float32) / jnp.sqrt(shape[0])
        return LoRA(a, jnp.zeros((rank, shape[1]), jnp.float32))

    return jax.tree.map_with_path(factors, params, mask, keys)


def lora_merge(params, lora, alpha: float):
    r"""The parameters to compute with: :math:`W_0 + (\alpha / r) A B` at the targets.

    The base takes no gradient (it is under `stop_gradient`), dtypes stay the base's.

    Args:
      params: the frozen base.
      lora: from `lora_init`, or trained since.
      alpha: scale; the paper's usual choice is r or 2 r.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxcomm
      >>> base = {"w": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
      >>> lora = jaxcomm.lora_init(base, rank=1, key=jax.random.key(0))
      >>> def loss_fn(lora, x, key):
      ...   params = jaxcomm.lora_merge(base, lora, alpha=1.0)
      ...   return jnp.mean((x @ params["w"] + params["bias"]) ** 2)
      >>> tx = optax.chain(jaxcomm.average("workers"), optax.adam(1e-2))
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=2)
      >>> state = step.init(lora, jax.random.key(1))  # 1 (6 + 4) parameters travel, not 28
    """

    def merge(w, factors):
        w = jax.lax.stop_gradient(w)
        if not isinstance(factors, LoRA):
            return w
        change = (alpha / factors.a.shape[1]) * (factors.a @ factors.b)
        return (w + change.reshape(w.shape)).astype(w.dtype)

    return jax.tree.map(merge, params, lora)


def trainable(tx: optax.GradientTransformation, mask) -> optax.GradientTransformation:
    """Applies a transform to the leaves of a mask; the others do not move, and do not travel.

    Args:
      tx: an optimizer, a chain or a bare communication (which stays one: `periodic` may be given
        `trainable(average(axis_name), mask)`).
      mask: tree of booleans, a prefix of the parameters, or a function of them, e.g.
        `leaves_named("bias|head")`.

    Returns:
      An Optax transform for the whole tree; its state holds nothing for the frozen leaves.

    Example:
      >>> import jaxcomm, optax
      >>> tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(0.25), "workers"), optax.adamw(1e-3))
      >>> tx = jaxcomm.trainable(tx, jaxcomm.leaves_named("bias"))
    """
    mask_fn = mask if callable(mask) else lambda params: mask
    frozen = lambda params: jax.tree.map(lambda keep: not keep, mask_fn(params))
    # made anew, so that by its type it is the same on all workers
    still = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), updates)
    )
    chain = optax.chain(optax.masked(tx, mask_fn), optax.masked(still, frozen))
    return Communication(*chain) if isinstance(tx, Communication) else chain
