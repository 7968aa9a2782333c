"""Random-k: k coordinates that all workers draw from a shared seed; no indices travel.

One coordinate of each of k nearly equal strata of a circle that is turned by a random offset:
drawn without replacement, each coordinate with probability exactly k/d, in O(k) with no sort,
and in memory order. The constants alpha = k/d and omega = d/k - 1 depend on these probabilities
alone. Source: Stich et al., Sparsified SGD with memory, arXiv 1809.07599; Konecny et al., arXiv
1610.05492 (random masks from a seed). The strata are ours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors.base import Payload, require_key
from jaxcomm.compressors.sparse import Sparsifier, check_fraction_or_k, kept


@dataclasses.dataclass(frozen=True)
class RandK(Sparsifier):
    """See `rand_k`."""

    fraction: float | None
    k: int | None
    scaled: bool

    @property
    def shared_key(self) -> bool:
        return True

    def count(self, size: int) -> int:
        return kept(self.fraction, self.k, size)

    def select(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Payload]:
        seed = jax.random.bits(require_key(key, "rand_k"), (2,), jnp.uint32)
        values = x[self.positions({"seed": seed}, x.shape[0])]
        if self.scaled and x.shape[0]:
            values = values * (x.shape[0] / self.count(x.shape[0]))
        return values, {"seed": seed}

    def positions(self, metadata: Payload, size: int) -> jax.Array:
        if size == 0:
            return jnp.zeros((0,), jnp.int32)
        k = self.count(size)
        turn, draw = jax.random.split(
            jax.random.wrap_key_data(metadata["seed"], impl="threefry2x32")
        )
        width, wider = divmod(size, k)  # the first `wider` strata have one coordinate more
        stratum = jnp.arange(k, dtype=jnp.int32)
        start = stratum * width + jnp.minimum(stratum, wider)
        within = jax.random.randint(draw, (k,), 0, width + (stratum < wider))
        # start + within + offset < 2^32; the position after one turn is below `size`.
        place = (start + within).astype(jnp.uint32) + jax.random.randint(
            turn, (), 0, size, jnp.int32
        ).astype(jnp.uint32)
        return jnp.where(place >= size, place - jnp.uint32(size), place).astype(jnp.int32)

    def alpha(self, size: int) -> float | None:
        """Unscaled: k/d, in expectation."""
        return None if self.scaled else (self.count(size) / size if size else 1.0)

    def omega(self, size: int) -> float | None:
        """Scaled: d/k - 1."""
        return (size / self.count(size) - 1.0 if size else 0.0) if self.scaled else None


def rand_k(fraction: float | None = None, *, k: int | None = None, scaled: bool = False) -> RandK:
    r"""Sends k coordinates drawn at random, the same on all workers.

    Unscaled it is a contraction in expectation, :math:`\alpha = k/d`; `scaled` multiplies by d/k,
    which makes it unbiased with :math:`\omega = d/k - 1`. Since all workers must draw the same
    coordinates (`shared_key` is True), payloads carry an 8-byte seed in place of indices. Exchanges
    that code a mean again ('two_phase', 'ring') draw others for it, and little or a much larger
    variance is left: take 'gather', as 'auto' does.

    Args:
      fraction: Send k = ceil(fraction * d) of d coordinates, at least one; in (0, 1].
      k: Or exactly this many. Exactly one of the two is given.
      scaled: Multiply by d/k.

    Returns:
      A random compressor of 4 k + 8 bytes; encode needs a key.

    Raises:
      ValueError: If not exactly one is given or it is out of range; at encode and payload_bytes
        when the vector has fewer than k coordinates.

    Example:
      >>> import jaxcomm.compressors as compressors
      >>> compressors.rand_k(0.01).payload_bytes(1000)
      48

    References:
      Stich et al., Sparsified SGD with Memory, arXiv 1809.07599.
    """
    return RandK(fraction, check_fraction_or_k("rand_k", fraction, k), scaled)
