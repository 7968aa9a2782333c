"""Random numbers for stochastic rounding, shape (size,)."""

import jax


def uniform(key: jax.Array, size: int) -> jax.Array:
    """float32 in [0, 1)."""
    return jax.random.uniform(key, (size,))
