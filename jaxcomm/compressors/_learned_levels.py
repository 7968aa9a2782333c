"""QSDP's learned quantization levels: one pass of stochastic gradient descent on 1-D k-means.

For each value v, normalised to [0, 1] within its block: j = argmin |q_j - v|,
q_j <- q_j - lr (q_j - v). Source: Markov et al., QSDP, arXiv 2302.02390, section on learned
weight quantization.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors._blocks import check_block_size, expand, inverse, reduce_blocks
from jaxcomm.compressors.base import require_whole


def learn_levels(
    x: jax.Array,
    bits: int,
    *,
    block_size: int = 256,
    learning_rate: float = 0.01,
    samples: int = 65_536,
    levels: tuple[float, ...] | None = None,
) -> tuple[float, ...]:
    r"""Levels for `quantize(bits, block_size, scheme='minmax', levels=...)`, fitted to `x`.

    A host function: run it now and then (QSDP: after some 400 steps of warm-up), on weights or
    gradients as they are. Pays at 6 bits and below.

    Args:
      x: The values to fit, any shape; more than `samples` are thinned evenly.
      bits: 1 to 8; 2^bits levels.
      block_size: Coordinates normalised together, as in the quantizer.
      learning_rate: Step towards each value, lr.
      samples: Values used at most.
      levels: Where to start; uniform levels by default.

    Returns:
      2^bits increasing numbers in [0, 1].

    Raises:
      ValueError: If an argument is out of its range, or `levels` has another length than 2^bits.

    Example:
      >>> import jax.numpy as jnp, jaxcomm.compressors as compressors
      >>> levels = compressors.learn_levels(jnp.linspace(0, 1, 512) ** 2, 2)
      >>> codec = compressors.quantize(2, scheme="minmax", levels=levels)

    References:
      Markov et al., Quantized Distributed Training of Large Models with Convergence Guarantees,
      arXiv 2302.02390.
    """
    bits = require_whole("learn_levels: bits", bits, 1, 8)
    samples = require_whole("learn_levels: samples", samples, 1)
    block = check_block_size("learn_levels", block_size)
    start = jnp.linspace(0.0, 1.0, 2**bits) if levels is None else jnp.asarray(levels, jnp.float32)
    if start.shape != (2**bits,):
        raise ValueError(f"learn_levels: levels must have {2**bits} entries, got {start.shape[0]}")
    flat = jnp.asarray(x, jnp.float32).reshape(-1)
    low = reduce_blocks(lambda rows: rows.min(1), flat, block)
    width = reduce_blocks(lambda rows: rows.max(1), flat, block) - low
    to_all = lambda part: expand(part, flat.shape[0], block)
    values = (flat - to_all(low)) * to_all(inverse(width))
    values = values[:: -(-values.shape[0] // samples)] if values.shape[0] else values
    fitted = np.sort(np.asarray(_descend(start, values, learning_rate), np.float64))
    return _separate(np.clip(fitted, 0.0, 1.0))


@jax.jit
def _descend(levels: jax.Array, values: jax.Array, learning_rate: float) -> jax.Array:
    def step(q, v):
        j = jnp.argmin(jnp.abs(q - v))
        return q.at[j].add(-learning_rate * (q[j] - v)), None

    return jax.lax.scan(step, levels, values)[0]


def _separate(levels: np.ndarray) -> tuple[float, ...]:
    """Equal levels (two that met) are put a hair apart, so that the quantizer takes them."""
    for j in range(1, len(levels)):
        levels[j] = max(levels[j], np.nextafter(levels[j - 1], 2.0))
    for j in range(len(levels) - 1, 0, -1):
        levels[j] = min(levels[j], 1.0)
        levels[j - 1] = min(levels[j - 1], np.nextafter(levels[j], -1.0))
    return tuple(float(q) for q in levels)
