r"""EF21+: each worker keeps the better of EF21's estimate and the plain compressed gradient.

    a_i = g_i + C(v_i - g_i),   b_i = C(v_i),   g_i <- the one closer to v_i,   u = (1/n) sum_i g_i

A worker sends one message and one flag. Since b_i replaces g_i, whoever averages must know every
g_i, as the paper's server does: here each replica keeps all n of them (n d float32 numbers).

Source: Richtarik, Sokolov & Fatkhullin 2021 (arXiv 2106.05203, Algorithm 3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm.collectives import AxisName, all_gather, flatten, index, size
from jaxcomm.collectives.flatten import tree_size
from jaxcomm.collectives.means import gather_payloads
from jaxcomm.collectives.primitives import sum_rows
from jaxcomm.compressors.base import Compressor
from jaxcomm.transforms.common import Communication, check_compressor, message_key, zero_count


class EF21PlusState(NamedTuple):
    """Everyone's estimate."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    everyone: jax.Array  # shape=(n, d), dtype=jnp.float32; replicated: row i is g_i


def ef21_plus(compressor: Compressor, axis_name: AxisName, *, seed: int = 0) -> Communication:
    """EF21 that falls back on plain compression wherever that is closer.

    Args:
      compressor: deterministic contractive codec C (the theory needs it to be), e.g. top_k(0.01).
      axis_name: name of the worker axis.
      seed: seeds the keys of random codecs.

    Returns:
      An Optax transform whose output is the estimate of the mean gradient. `init` must run where
      the axis is bound (make_train_step does that); the state has n times the model's size.

    References:
      Richtarik, Sokolov & Fatkhullin, EF21, arXiv 2106.05203.
    """
    check_compressor(compressor, "ef21_plus")

    def init_fn(params):
        zeros = jnp.zeros((size(axis_name), tree_size(params)), jnp.float32)
        return EF21PlusState(zero_count(), zeros)

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        gradient, unflatten = flatten(updates)
        decode = lambda payload: compressor.decode(payload, gradient.size)
        key = message_key(seed, state.count, axis_name, compressor)
        local = state.everyone[index(axis_name)]
        difference = compressor.encode(gradient - local, key)
        plain = compressor.encode(gradient, key)
        distance = lambda estimate: jnp.sum((estimate - gradient) ** 2)
        replace = distance(decode(plain)) < distance(local + decode(difference))
        payload = {part: jnp.where(replace, plain[part], difference[part]) for part in plain}

        flags = all_gather(replace, axis_name, "flags")
        messages = jax.vmap(decode)(gather_payloads(payload, axis_name))
        everyone = messages + jnp.where(flags[:, None], 0.0, state.everyone)
        mean = unflatten(sum_rows(everyone) / everyone.shape[0])
        return mean, EF21PlusState(state.count + 1, everyone)

    return Communication(init_fn, update_fn)
