"""What the one-bit optimizers share: the compressed momentum, the freeze, and the safety rule.

A worker's momentum goes through the two-phase mean with a worker's and a server's error memory:

    b_i = m_i + e_i,                  e_i <- b_i - C(b_i)
    z = (1/n) sum_i C(b_i) + s,       s <- z - C(z),          m = C(z)

One bit says +scale or -scale and never "nothing", and the step divides by sqrt(v) of a variance
that no longer follows the gradient. A coordinate whose frozen variance is (almost) zero would be
thrown by scale / sqrt(v), and its gradient would raise the scale for all. Hence the safety rule, in
force while v is frozen:

    v_j = 0 (never hit in the warm-up):  m_j = e_j = 0, the coordinate stays where it is
    otherwise:                           |m_j / (sqrt(v_j) + eps)| <= max_update

max_update is by default what Adam's own steps cannot exceed, max(1, (1 - b1) / sqrt(1 - b2))
(Kingma & Ba 2015, arXiv 1412.6980, section 2.1; 3.16 for the usual decays), so that no coordinate
moves further than Adam could move it. For the sign codec this is the same as a floor of
scale / max_update under the denominator. Where it does not bind, nothing changes.

Source of the exchange: Tang et al. 2021, "1-bit Adam" (arXiv 2102.02888), Algorithm 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm.collectives import AxisName, flatten, size
from jaxcomm.collectives.flatten import tree_size
from jaxcomm.collectives.means import chunk_size
from jaxcomm.compressors.base import Compressor
from jaxcomm.transforms._average import exchange_mean
from jaxcomm.transforms.common import check_compressor, check_fixed, message_key

#: The variance is stable when its 1-norm is this share of what it was a window ago (1-bit Adam).
STABLE_RATIO = 0.96


class Freeze(NamedTuple):
    """When the variance freezes: after `step` updates, or (None) once its norm is stable.

    Automatic: ||v_t||_1 >= 0.96 ||v_{t-window}||_1, v corrected for its bias, so that its growth
    from zero is not taken for stability; t >= warmup_steps (the learning rate's warm-up).
    """

    step: int | jax.Array | None
    window: int
    warmup_steps: int

    def initial_norms(self) -> jax.Array | None:
        """Room for the norms of the last `window` updates, if the rule needs them."""
        return jnp.zeros((self.window,), jnp.float32) if self.step is None else None

    def due(self, t: jax.Array, v_hat: jax.Array, norms: jax.Array | None):
        """Whether v stays as it is after update t (counted from 1), and the norms to keep."""
        if norms is None:
            assert self.step is not None
            return t >= self.step, None
        norm, slot = jnp.sum(v_hat), (t - 1) % self.window
        stable = (norm > 0) & (norm >= STABLE_RATIO * norms[slot])
        due = (t > self.window) & (t >= self.warmup_steps) & stable
        return due, norms.at[slot].set(norm)


def make_freeze(where: str, freeze_step, b2, window: int | None, warmup_steps: int) -> Freeze:
    """A checked Freeze; the window defaults to the paper's 1 / (1 - b2)."""
    if isinstance(freeze_step, int) and freeze_step < 1:
        raise ValueError(f"{where}: freeze_step must be at least 1, got {freeze_step}")
    if freeze_step is not None:
        return Freeze(freeze_step, 0, warmup_steps)
    if window is None:
        check_fixed(b2, "b2 (without freeze_step and variance_window)", where)
        window = max(1, round(1 / (1 - b2)))
    check_fixed(window, "variance_window (without freeze_step)", where)
    if window < 1:
        raise ValueError(f"{where}: variance_window must be at least 1, got {window}")
    return Freeze(None, window, warmup_steps)


def update_limit(max_update, b1, b2):
    """The limit of a step in learning rates; None is Adam's own bound."""
    if max_update is not None:
        return max_update
    return jnp.maximum(1.0, (1 - b1) / jnp.sqrt(1 - jnp.asarray(b2, jnp.float32)))


def check_one_bit(where: str, compressor: Compressor, max_update, **decays) -> None:
    """Raises for arguments that no one-bit optimizer takes."""
    check_compressor(compressor, where)
    for name, value in decays.items():
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"{where}: {name} must be in [0, 1), got {value}")
    if isinstance(max_update, (int, float)) and not max_update > 0:
        raise ValueError(f"{where}: max_update must be positive, got {max_update}")


def zero_server_error(params, axis_name: AxisName) -> jax.Array:
    """The second hop's memory at its start, shape (ceil(d/n),); needs the axis bound."""
    return jnp.zeros((chunk_size(tree_size(params), size(axis_name)),), jnp.float32)


class OneBitExchange(NamedTuple):
    """The error-compensated two-phase mean."""

    compressor: Compressor  # of both hops
    axis_name: AxisName
    seed: int  # of random codecs' keys

    def mean(
        self, x: jax.Array, state, alive: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The mean of x, zero where a coordinate is not alive.

        Args:
          x: this worker's vector.
          state: an optimizer's; its count, error (e_i) and server_error (s) are read.
          alive: which coordinates take part, the same on all workers.

        Returns:
          (mean, replicated; this worker's new error, a vector; its new server error).
        """
        message = jnp.where(alive, x + flatten(state.error)[0], 0.0)
        key = message_key(self.seed, state.count, self.axis_name, self.compressor)
        result = exchange_mean(
            message, self.compressor, self.axis_name, key, "two_phase", state.server_error
        )
        error = jnp.where(alive, message - result.sent, 0.0)
        return jnp.where(alive, result.mean, 0.0), error, result.server_error


def debias(moment: jax.Array, decay, t: jax.Array) -> jax.Array:
    """Adam's bias correction after t updates."""
    return moment / (1 - jnp.asarray(decay, jnp.float32) ** t)


def precondition(m_hat: jax.Array, v_hat: jax.Array, eps, limit=jnp.inf) -> jax.Array:
    """m / (sqrt(v) + eps), held within +-limit, zero where the variance is."""
    direction = jnp.clip(m_hat / (jnp.sqrt(v_hat) + eps), -limit, limit)
    return jnp.where(v_hat > 0, direction, 0.0)


def decaying(params, mask):
    """The parameters as a float32 vector, zero where the mask (as in `optax.adamw`) says so."""
    if mask is not None:
        mask = mask(params) if callable(mask) else mask
        scale = lambda keep: lambda x: x if keep else jnp.zeros_like(x)
        params = jax.tree.map(lambda keep, part: jax.tree.map(scale(keep), part), mask, params)
    return flatten(params)[0]
