"""A sparsifier whose values a quantizer codes: sparse positions, narrow values."""

import dataclasses

import jax

from jaxcomm.compressors.base import Compressor, Payload
from jaxcomm.compressors.sparse import Sparsifier


@dataclasses.dataclass(frozen=True)
class Composed(Sparsifier):
    """See `compose`."""

    sparsifier: Sparsifier
    quantizer: Compressor

    @property
    def shared_key(self) -> bool:
        return self.sparsifier.shared_key or self.quantizer.shared_key

    def count(self, size: int) -> int:
        return self.sparsifier.count(size)

    def select(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Payload]:
        return self.sparsifier.select(x, key)

    def positions(self, metadata: Payload, size: int) -> jax.Array:
        return self.sparsifier.positions(metadata, size)

    def coded_size(self, size: int) -> int:
        return self.sparsifier.coded_size(size)

    def synthesize(self, coded: jax.Array, size: int) -> jax.Array:
        return self.sparsifier.synthesize(coded, size)

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        first, second = (None, None) if key is None else jax.random.split(key)
        values, metadata = self.select(x, first)
        coded = self.quantizer.encode(values, second)
        assert not metadata.keys() & coded.keys()
        return {**coded, **metadata}

    def decode(self, payload: Payload, size: int) -> jax.Array:
        values = self.quantizer.decode(self._coded(payload), self.count(size))
        return self.place(values, self._metadata(payload), size)

    def decode_sum(
        self, payloads: Payload, size: int, coefficients: jax.Array | None = None
    ) -> jax.Array:
        one = lambda coded: self.quantizer.decode(coded, self.count(size))
        values = jax.vmap(one)(self._coded(payloads))
        if coefficients is not None:
            values = coefficients[:, None] * values
        return self.place(values, self._metadata(payloads), size)

    def _metadata(self, payload: Payload) -> Payload:
        return {name: part for name, part in payload.items() if name in _LOCATIONS}

    def _coded(self, payload: Payload) -> Payload:
        return {name: part for name, part in payload.items() if name not in _LOCATIONS}

    def alpha(self, size: int) -> float | None:
        """alpha_s alpha_q (or alpha_s (1 - omega_q)): the quantizer errs on the kept part only."""
        kept = self.sparsifier.alpha(size)
        if kept is None:
            return None
        part = self.quantizer.alpha(self.count(size))
        if part is None:
            omega = self.quantizer.omega(self.count(size))
            part = None if omega is None or omega >= 1 else 1.0 - omega
        return None if part is None else kept * part

    def omega(self, size: int) -> float | None:
        """(1 + omega_s)(1 + omega_q) - 1 where both are unbiased."""
        kept, coded = self.sparsifier.omega(size), self.quantizer.omega(self.count(size))
        return None if kept is None or coded is None else (1 + kept) * (1 + coded) - 1


#: Names that sparsifiers give to what locates the values.
_LOCATIONS = ("indices", "seed")


def compose(sparsifier: Sparsifier, quantizer: Compressor) -> Composed:
    r"""Sparsifies, then codes the kept values with another compressor.

    With contractions :math:`\alpha_s, \alpha_q` of the two, :math:`\alpha = \alpha_s \alpha_q`;
    for an unbiased quantizer :math:`\alpha = \alpha_s (1 - \omega_q)` where that is positive; for
    two unbiased ones :math:`1 + \omega = (1 + \omega_s)(1 + \omega_q)`. When either needs the same
    key on all workers, both use it.

    Args:
      sparsifier: `top_k`, `block_top_k`, `threshold_top_k`, `rand_k` or `dct_top_k`.
      quantizer: Any compressor that is not a sparsifier.

    Returns:
      A compressor of the quantizer's bytes for k values plus the sparsifier's indices.

    Raises:
      ValueError: If the first is not a sparsifier, or the second is one or no compressor.

    Example:
      >>> import jaxcomm.compressors as compressors
      >>> c = compressors.compose(compressors.top_k(0.01), compressors.quantize(2))
      >>> c.payload_bytes(100_000)  # 1000 values of 2 bits, 4 scales, indices of 17 bits
      2391

    References:
      SparseLoCo (Sarfi et al., arXiv 2508.15706) sends top-k with 2-bit values.
    """
    if not isinstance(sparsifier, Sparsifier) or isinstance(sparsifier, Composed):
        raise ValueError(f"compose: sparsifier must be a sparse compressor, got {sparsifier!r}")
    if isinstance(quantizer, Sparsifier) or not isinstance(quantizer, Compressor):
        raise ValueError(f"compose: quantizer must be a dense compressor, got {quantizer!r}")
    return Composed(sparsifier, quantizer)
