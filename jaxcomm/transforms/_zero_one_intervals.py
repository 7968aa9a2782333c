"""When 0/1 Adam meets and when it updates its variance, as pure functions of the step.

Source: Lu et al. 2022, "0/1 Adam" (arXiv 2202.06009), the policies of section 6.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Intervals = Callable[[jax.Array], jax.Array]  # first step of a round, int32 -> its length, int32


def local_step_intervals(start: int, scaler: int = 32678, longest: int = 16) -> Intervals:
    """T_u of the paper: meets every step before `start`, then at distances that double.

    The distance is min(2^((t - start) // scaler), longest). The paper starts when v is frozen and
    sets `scaler` to the steps in which its learning rate halves.

    Raises:
      ValueError: start < 0, scaler < 1 or longest < 1.
    """
    if start < 0 or scaler < 1 or longest < 1:
        raise ValueError(
            "local_step_intervals: needs start >= 0, scaler >= 1 and longest >= 1, got "
            f"{start=}, {scaler=}, {longest=}"
        )
    most = longest.bit_length() - 1

    def interval(step):
        doublings = jnp.clip((step - start) // scaler, 0, most + 1)
        return jnp.minimum(jnp.left_shift(1, doublings), longest).astype(jnp.int32)

    return interval


def variance_intervals(scaler: int = 16) -> Intervals:
    """T_v of the paper: the j-th and the next update of v are 2^(j // scaler) steps apart.

    Raises:
      ValueError: scaler < 1.
    """
    if scaler < 1:
        raise ValueError(f"variance_intervals: scaler must be at least 1, got {scaler}")

    def interval(step):  # the j-th is at scaler (2^q - 1) + r 2^q, for j = q scaler + r
        doublings = 31 - jax.lax.clz(jnp.asarray(step // scaler + 1, jnp.int32))
        return jnp.left_shift(1, doublings).astype(jnp.int32)

    return interval


def as_intervals(where: str, name: str, value: Intervals | int) -> Intervals:
    if callable(value):
        return lambda step: jnp.maximum(jnp.asarray(value(step), jnp.int32), 1)
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {value}")
    return lambda step: jnp.asarray(value, jnp.int32)
