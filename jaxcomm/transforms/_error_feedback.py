"""Classic error feedback (EC, EF14): what was not sent is added to the next message.

    D_i = C(e_i + g_i),   e_i <- e_i + g_i - D_i,   u = (1/n) sum_i D_i

Source: Seide et al. 2014 (1-bit SGD); Stich, Cordonnier & Jaggi 2018 (arXiv 1809.07599);
Karimireddy et al. 2019 (arXiv 1901.09847). Facts tested: sum_t u_t + mean_i e_i = sum_t mean_i g_i
(telescoping), and x - gamma mean_i e_i follows uncompressed SGD (virtual iterate).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, flatten
from jaxcomm.collectives.exchange import check_exchange, exchange_mean, server_error_size
from jaxcomm.collectives.flatten import tree_size, zeros_like_float32
from jaxcomm.compressors.base import Compressor
from jaxcomm.transforms.common import Communication, check_compressor, message_key, zero_count


class ErrorFeedbackState(NamedTuple):
    """Error memories."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    error: optax.Updates  # float32, like params; per worker: e_i
    server_error: jax.Array | None  # float32, shape=(ceil(d/n),); per worker; two_phase only


def error_feedback(
    compressor: Compressor,
    axis_name: AxisName,
    *,
    decay: float | jax.Array = 1.0,
    exchange: str = "gather",
    bucket_bytes: int | None = None,
    seed: int = 0,
) -> Communication:
    """Mean of compressed updates with an error memory on every worker.

    Args:
      compressor: any codec, contractive or unbiased.
      axis_name: name of the worker axis.
      decay: factor of the memory before the new update is added (1: classic; SparseLoCo: 0.95).
      exchange: 'gather', 'two_phase' (with a second error memory for the second hop), 'ring',
        'hierarchical' (axis_name is then a pair: fast axis, slow axis), 'dense' or 'auto' (see
        `jaxcomm.collectives.exchange_mean`).
      bucket_bytes: exchange in parts of so many bytes of float32; None is all at once. The
        memories do not depend on it.
      seed: seeds the keys of random codecs.

    Returns:
      An Optax transform. With exchange='two_phase' or 'auto' its `init` must run where the axis
      is bound (make_train_step does that): the second memory has ceil(d/n) elements.

    Raises:
      ValueError: decay outside [0, 1], an unknown exchange, or a bucket smaller than a float.
    """
    check_compressor(compressor, "error_feedback")
    check_exchange(exchange, "error_feedback", bucket_bytes)
    if isinstance(decay, (int, float)) and not 0 <= decay <= 1:
        raise ValueError(f"error_feedback: decay must be in [0, 1], got {decay}")

    def init_fn(params):
        server = None
        if exchange in ("two_phase", "auto"):
            length = server_error_size(exchange, compressor, tree_size(params), axis_name)
            server = None if length is None else jnp.zeros((length,), jnp.float32)
        return ErrorFeedbackState(zero_count(), zeros_like_float32(params), server)

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        add = lambda e, u: decay * e + u.astype(jnp.float32)
        total, unflatten = flatten(jax.tree.map(add, state.error, updates))[0], flatten(updates)[1]
        key = message_key(seed, state.count, axis_name, compressor)
        result = exchange_mean(
            total, compressor, axis_name, key, exchange, state.server_error, bucket_bytes
        )
        error = unflatten(total - result.sent, jnp.float32)
        new = ErrorFeedbackState(state.count + 1, error, result.server_error)
        return unflatten(result.mean), new

    return Communication(init_fn, update_fn)
