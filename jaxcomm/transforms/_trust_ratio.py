"""Trust ratios of 1-bit LAMB: the arithmetic, tensor by tensor (see `_one_bit_lamb`)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TrustRatio(NamedTuple):
    """How 1-bit LAMB scales the step of a tensor; the defaults are the paper's."""

    smallest: float = 0.01  # of the warm-up's ratio
    largest: float = 10.0
    decay: float = 0.9  # of its average
    smallest_factor: float = 0.5  # of the factor after the freeze
    largest_factor: float = 4.0
    threshold: float = 0.1  # its largest relative change in a step

    def check(self, where: str) -> None:
        """Raises a ValueError for limits that are out of order."""
        ordered = self.smallest <= self.largest
        if not (ordered and self.smallest_factor <= 1 <= self.largest_factor):
            raise ValueError(
                f"{where}: trust needs smallest <= largest and smallest_factor <= 1 <= "
                f"largest_factor, got {self}"
            )


class Tensors(NamedTuple):
    """Per-tensor figures of a flat vector: shape (leaves,)."""

    unflatten: Callable
    sizes: list[int]

    def memory(self, vector):
        """The vector as a float32 tree."""
        return self.unflatten(vector, jnp.float32)

    def _each(self, fn, *vectors):
        leaves = zip(*(jax.tree.leaves(self.memory(x)) for x in vectors))
        figures = [fn(*parts) for parts in leaves]
        return jnp.stack(figures) if figures else jnp.zeros((0,))

    def norm(self, x):
        """2-norms."""
        return self._each(lambda part: jnp.sqrt(jnp.sum(part**2)), x)

    def rms(self, x):
        """Root mean squares."""
        return self._each(lambda part: jnp.sqrt(jnp.sum(part**2) / max(part.size, 1)), x)

    def max(self, x, where):
        """Of the elements for which `where` holds; 1 if there is none."""
        best = lambda part, alive: jnp.max(jnp.where(alive > 0, part, -1.0), initial=-1.0)
        found = self._each(best, x, where.astype(jnp.float32))
        return jnp.where(found < 0, 1.0, found)

    def spread(self, figures):
        """Each tensor's figure at all its elements."""
        return jnp.repeat(figures, jnp.array(self.sizes), total_repeat_length=sum(self.sizes))


def ratio_of(a, b):
    """a / b, and 1 where either is zero."""
    return jnp.where((a > 0) & (b > 0), a / jnp.where(b > 0, b, 1.0), 1.0)


def one_scale(rms):
    """What multiplies each tensor so that all have the mean of their sizes; 1 for empty ones."""
    return jnp.where(rms > 0, jnp.mean(rms) / jnp.where(rms > 0, rms, 1.0), 1.0)


def running_mean(old, c, decay):
    """The average of the ratios; a ratio of exactly 1 is none (LAMB's answer to a zero norm)."""
    moved = jnp.where(old > 0, decay * old + (1 - decay) * c, c)
    return jnp.where(c == 1, old, moved)


def tame(factor, share, last, trust: TrustRatio):
    """The factor for the share of the step that is Adam's, held in its limits."""
    share = jnp.minimum(share, 1.0)
    factor = factor * share + 1 - share
    factor = jnp.clip(factor, trust.smallest_factor, trust.largest_factor)
    return jnp.clip(factor, last * (1 - trust.threshold), last * (1 + trust.threshold))
