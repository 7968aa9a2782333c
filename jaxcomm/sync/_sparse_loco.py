r"""SparseLoCo: the largest few displacements of every chunk, in two bits, with error feedback.

    e_i <- beta e_i + D_i,   m_i = Q(TopK(e_i)),   e_i <- e_i - m_i,   z <- z - alpha mean_i m_i

The decayed memory takes the place of outer momentum. Source: Sarfi, Thérien, Lidin & Belilovsky
2025, "Communication Efficient LLM Pre-training with SparseLoCo" (arXiv 2508.15706).
"""

import optax

from jaxcomm.collectives import AxisName
from jaxcomm.compressors._compose import compose
from jaxcomm.compressors._quantize import quantize
from jaxcomm.compressors._top_k import block_top_k
from jaxcomm.sync._periodic import periodic
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._schedules import Schedule
from jaxcomm.transforms._error_feedback import error_feedback


def sparse_loco(
    axis_name: AxisName,
    every: Schedule | int = 30,
    *,
    density: float | None = None,
    k: int | None = None,
    chunk_size: int = 4096,
    bits: int | None = 2,
    decay: float = 0.95,
    outer_learning_rate: float = 1.0,
    total_steps: int | None = None,
) -> SyncRule:
    """SparseLoCo with one scale a chunk; indices cost log2(chunk_size) bits each.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      density: share of each chunk that is sent, in (0, 1]; default 1/64.
      k: or how many of each chunk.
      chunk_size: coordinates a chunk.
      bits: bits of a value; None sends float32 values.
      decay: beta, of the error memory.
      outer_learning_rate: alpha.
      total_steps: length of the training; the last round ends there.

    Raises:
      ValueError: both density and k, or one out of its range.
    """
    if density is None and k is None:
        density = 1 / 64
    codec = block_top_k(density, k=k, block_size=chunk_size)
    if bits is not None:
        codec = compose(codec, quantize(bits, block_size=codec.count(chunk_size)))
    outer = optax.chain(
        error_feedback(codec, axis_name, decay=decay), optax.sgd(outer_learning_rate)
    )
    return periodic(outer, every, total_steps=total_steps)
