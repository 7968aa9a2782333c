"""Random bits for stochastic rounding, many and cheap.

A threefry word costs 50 times a copy of its coordinate on a CPU and would be the whole price of a
random codec. Rounding needs no cryptographic quality: a counter is hashed twice with Wellons's
32-bit mixer `lowbias32` (hash-prospector, public domain), under two words drawn from the key.
"""

import jax
import jax.numpy as jnp


def bits(key: jax.Array, size: int) -> jax.Array:
    """uint32 random bits, shape (size,)."""
    seed = jax.random.bits(key, (2,), jnp.uint32)
    return _mix(_mix(jnp.arange(size, dtype=jnp.uint32) + seed[0]) ^ seed[1])


def uniform(key: jax.Array, size: int) -> jax.Array:
    """float32 multiples of 2^-24 in [0, 1), shape (size,)."""
    return (bits(key, size) >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def rounded(v: jax.Array, noise: jax.Array) -> jax.Array:
    """floor(v + noise) for noise in [0, 1), so that a whole v stays as it is.

    Not by that sum, which float32 rounds: 127 + (1 - 2^-24) is 128.
    """
    low = jnp.floor(v)
    return jnp.where(noise + (v - low) >= 1, low + 1, low)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)
