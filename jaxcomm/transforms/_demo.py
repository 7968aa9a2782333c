r"""DeMo: only the fast components of the momentum travel, as DCT coefficients.

    d_i <- beta d_i + gamma g_i
    q_i = the k largest DCT coefficients of each block of d_i;   d_i <- d_i - decoded(q_i)
    x <- (1 - gamma lambda) x - gamma sgn(IDCT(mean of q over the workers that sent a coefficient))

Every tensor is a matrix here (a vector is one row; leading axes are merged) that is cut into
blocks of at most chunk x chunk. A side of any length is cut into the fewest equal blocks, padded
with fewer zeros than there are blocks; where `chunk` divides it, blocks are chunk long, as in the
released code, which needs a divisor and falls to tiny blocks for prime sides. A leaf whose blocks
have at most k coefficients would travel whole: its momentum is averaged dense, which is the same
step for fewer bytes, and logged.

Source: Peng, Quesnelle & Kingma 2024, "DeMo: Decoupled Momentum Optimization" (arXiv 2411.19870).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, all_gather
from jaxcomm.collectives.axis import match_varying
from jaxcomm.collectives.flatten import check_floating, zeros_like_float32
from jaxcomm.compressors import packing
from jaxcomm.compressors._dct import dct_basis
from jaxcomm.compressors._top_k import largest
from jaxcomm.transforms.common import (
    check_fixed,
    combine,
    leaf_names,
    log_dense,
    mean_left_dense,
    partition,
    zero_count,
)


class DemoState(NamedTuple):
    """The local momentum."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    momentum: optax.Updates  # float32, like params; per worker: d_i, without what has been sent


class Blocks(NamedTuple):
    """How a tensor is cut: `rows` x `columns` blocks of `height` x `width`."""

    shape: tuple[int, ...]
    rows: int
    height: int
    columns: int
    width: int

    @property
    def count(self) -> int:
        return self.rows * self.columns

    @property
    def area(self) -> int:
        """Coefficients of one block."""
        return self.height * self.width


def cut(shape: tuple[int, ...], chunk: int) -> Blocks:
    """The blocks of a tensor of this shape: the fewest equal ones with sides of at most chunk."""
    sides = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    counts = [max(1, -(-side // chunk)) for side in sides]
    lengths = [-(-side // count) for side, count in zip(sides, counts)]
    return Blocks(shape, counts[0], lengths[0], counts[1], lengths[1])


def spectrum(x: jax.Array, blocks: Blocks) -> jax.Array:
    """Orthonormal DCT-II coefficients of every block: (blocks.count, blocks.area)."""
    rows, columns = blocks.rows * blocks.height, blocks.columns * blocks.width
    x = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    x = jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
    x = x.reshape(blocks.rows, blocks.height, blocks.columns, blocks.width)
    bases = dct_basis(blocks.height), dct_basis(blocks.width)
    # accelerators round float32 products to bfloat16 or tf32 unless told otherwise
    x = jnp.einsum("ih,rhcw,jw->rcij", bases[0], x, bases[1], precision="highest")
    return x.reshape(blocks.count, blocks.area)


def from_spectrum(coefficients: jax.Array, blocks: Blocks) -> jax.Array:
    """The tensor with these coefficients: `spectrum` undone."""
    x = coefficients.reshape(blocks.rows, blocks.columns, blocks.height, blocks.width)
    bases = dct_basis(blocks.height), dct_basis(blocks.width)
    x = jnp.einsum("ih,rcij,jw->rhcw", bases[0], x, bases[1], precision="highest")
    x = x.reshape(blocks.rows * blocks.height, blocks.columns * blocks.width)
    sides = (math.prod(blocks.shape[:-1]), blocks.shape[-1]) if blocks.shape else (1, 1)
    return x[: sides[0], : sides[1]].reshape(blocks.shape)


def demo(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: AxisName,
    *,
    decay: float = 0.999,
    k: int = 32,
    chunk: int = 64,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled momentum: every worker keeps its own and sends k coefficients a block of it.

    .. math:: \delta_i \leftarrow \beta\delta_i + \gamma g_i,\quad
      \delta_i \leftarrow \delta_i - \mathrm{decoded}(q_i),\quad
      x \leftarrow (1 - \gamma\lambda) x - \gamma\,\mathrm{sgn}(\mathrm{decoded}(\bar q))

    where q is the mean of each coefficient over the workers that sent it. Coordinates whose decoded
    mean is exactly zero do not move.

    Args:
      learning_rate: gamma, a number or an Optax schedule; the size of each coordinate's move.
      axis_name: name of the worker axis.
      decay: beta in [0, 1).
      k: coefficients sent of each block.
      chunk: longest side of a block.
      weight_decay: lambda, decoupled, applied to the parameters before the move.

    Returns:
      An Optax optimizer. A worker sends k (4 + ceil(log2(block)) / 8) bytes a block to each other.
      Inside `optax.inject_hyperparams` name k and chunk in `static_args`.

    Raises:
      ValueError: decay outside [0, 1), k or chunk not a positive Python int.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm
      >>> step = jaxcomm.make_train_step(
      ...     lambda x, batch, key: jnp.mean((x - batch) ** 2), jaxcomm.demo(0.1, "workers", k=8),
      ...     axis_name="workers", simulate=2)
      >>> state = step.init(jnp.ones(100), jax.random.key(0))
      >>> state, metrics = step(state, jnp.zeros((2, 100)))
      >>> bool(jnp.allclose(state.params, 0.9))
      True

    References:
      Peng, Quesnelle & Kingma, DeMo, arXiv 2411.19870.
    """
    for name, value in (("k", k), ("chunk", chunk)):
        check_fixed(value, name, "demo")
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"demo: {name} must be a Python int of at least 1, got {value}")
    if isinstance(decay, (int, float)) and not 0 <= decay < 1:
        raise ValueError(f"demo: decay must be in [0, 1), got {decay}")
    compressed = lambda leaf: cut(jnp.shape(leaf), chunk).area > k

    def init_fn(params):
        reason = f"no block has more than k={k} coefficients"
        log_dense("demo", leaf_names(partition(params, compressed)[1]), reason)
        return DemoState(zero_count(), zeros_like_float32(params))

    def update_fn(updates, state, params=None, **extra):
        del extra
        if params is None and not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
            raise ValueError("demo: weight_decay needs update(..., params), got None")
        check_floating(updates)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, jnp.float32)
        momentum = jax.tree.map(
            lambda d, g: decay * d + rate * g.astype(jnp.float32), state.momentum, updates
        )
        fast, dense = partition(momentum, compressed)
        leaves, treedef = jax.tree.flatten(fast)
        mean, sent = _exchange(leaves, [cut(x.shape, chunk) for x in leaves], k, axis_name)
        rest = jax.tree.unflatten(treedef, [x - y for x, y in zip(leaves, sent)])
        momentum = combine(rest, zeros_like_float32(dense))  # dense leaves are sent whole
        mean = combine(jax.tree.unflatten(treedef, mean), mean_left_dense(dense, axis_name))
        step = jax.tree.map(lambda m: -rate * jnp.sign(m), mean)
        if params is not None:
            step = jax.tree.map(lambda s, x: s - rate * weight_decay * x, step, params)
        step = jax.tree.map(lambda s, g: s.astype(g.dtype), step, updates)
        return step, DemoState(state.count + 1, momentum)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _exchange(leaves: Sequence[jax.Array], cuts: Sequence[Blocks], k: int, axis_name: AxisName):
    """Tensors of the mean coefficients, and of those that this worker sent."""
    if not leaves:
        return [], []
    values, indices = [], []
    for x, blocks in zip(leaves, cuts):
        coefficients = spectrum(x, blocks)
        where = largest(coefficients, k)
        values.append(jnp.take_along_axis(coefficients, where, axis=1).reshape(-1))
        indices.append(packing.pack(where.reshape(-1), packing.index_bits(blocks.area)))
    own = jnp.concatenate(values), jnp.concatenate(indices)
    everyone = all_gather(own[0], axis_name), all_gather(own[1], axis_name, "indices")

    # One worker at a time: positions are then unique, and the sum does not depend on the order in
    # which an accelerator scatters, so that replicas stay equal to the last bit.
    def add(carry, message):
        total, senders = carry
        where = _positions(message[1], cuts, k)
        total = total.at[where].add(message[0], unique_indices=True)
        return (total, senders.at[where].add(1.0, unique_indices=True)), None

    zeros = jnp.zeros((sum(blocks.count * blocks.area for blocks in cuts),), jnp.float32)
    zeros = match_varying(zeros, everyone[0])  # messages may differ along other axes
    (total, senders), _ = jax.lax.scan(add, (zeros, zeros), everyone)
    mine = zeros.at[_positions(own[1], cuts, k)].set(own[0], unique_indices=True)
    return _tensors(total / jnp.maximum(senders, 1.0), cuts), _tensors(mine, cuts)


def _positions(indices: jax.Array, cuts: Sequence[Blocks], k: int) -> jax.Array:
    """Where a message's values belong in the concatenated spectra, int32."""
    found, start, byte = [], 0, 0
    for blocks in cuts:
        bits = packing.index_bits(blocks.area)
        stop = byte + packing.packed_bytes(blocks.count * k, bits)
        within = packing.unpack(indices[byte:stop], bits, blocks.count * k).astype(jnp.int32)
        first = jnp.arange(blocks.count, dtype=jnp.int32) * blocks.area + start
        found.append(jnp.repeat(first, k) + within)
        start, byte = start + blocks.count * blocks.area, stop
    return jnp.concatenate(found)


def _tensors(coefficients: jax.Array, cuts: Sequence[Blocks]) -> list[jax.Array]:
    parts = jax.lax.split(coefficients, [blocks.count * blocks.area for blocks in cuts])
    return [from_spectrum(part, blocks) for part, blocks in zip(parts, cuts)]
