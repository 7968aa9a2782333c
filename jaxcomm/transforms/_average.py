"""Averages over the workers, dense or compressed without memory.

    u = (1/n) sum_i g_i          average
    u = (1/n) sum_i C(g_i)       compressed_average

Without error feedback a contractive C may diverge (Beznosikov et al. 2020, arXiv 2002.12410,
Example 1); unbiased codecs (quantize with stochastic rounding, natural, rand_k scaled) are safe.
"""

import optax

from jaxcomm.collectives import AxisName, flatten
from jaxcomm.collectives import mean as tree_mean
from jaxcomm.collectives.exchange import check_bucket, check_exchange, exchange_mean
from jaxcomm.compressors.base import Compressor
from jaxcomm.transforms.common import (
    Communication,
    CountState,
    check_compressor,
    message_key,
    zero_count,
)


def average(axis_name: AxisName, *, bucket_bytes: int | None = None) -> Communication:
    """Dense mean of the updates over the workers, in float32, leaf dtypes kept.

    Args:
      axis_name: name (or tuple of names) of the worker axis.
      bucket_bytes: a sum for every so many bytes of float32, of whole leaves, so that (with
        make_train_step's background=True) the first travel while the backward pass goes on; None
        is one sum.

    Returns:
      An Optax transform without state.

    Raises:
      ValueError: bucket_bytes below 4.
    """

    check_bucket(bucket_bytes, "average")

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        return tree_mean(updates, axis_name, bucket_bytes), state

    return Communication(init_fn, update_fn)


def compressed_average(
    compressor: Compressor,
    axis_name: AxisName,
    *,
    exchange: str = "gather",
    bucket_bytes: int | None = None,
    seed: int = 0,
) -> Communication:
    """Mean of the workers' compressed updates, without error memory.

    Args:
      compressor: the codec; unbiased ones keep the mean unbiased.
      axis_name: name of the worker axis.
      exchange: 'gather', 'two_phase', 'ring', 'dense', 'hierarchical' or 'auto' (see
        `jaxcomm.collectives.exchange_mean`).
      bucket_bytes: exchange in parts of so many bytes of float32; None is all at once.
      seed: seeds the keys of random codecs.

    Returns:
      An Optax transform; its state counts the messages.
    """
    check_compressor(compressor, "compressed_average")
    check_exchange(exchange, "compressed_average", bucket_bytes)

    def init_fn(params):
        del params
        return CountState(zero_count())

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        vector, unflatten = flatten(updates)
        key = message_key(seed, state.count, axis_name, compressor)
        result = exchange_mean(
            vector, compressor, axis_name, key, exchange, bucket_bytes=bucket_bytes
        )
        return unflatten(result.mean), CountState(state.count + 1)

    return Communication(init_fn, update_fn)
