"""What a compressor is: a pure codec `x -> payload -> x^` on flat float32 vectors.

A payload is a dict of arrays. What is in it is what travels: unsigned integers (bits packed,
indices at the width they need, narrow floats bitcast) and float32 scales. Every shape is static.
The keys name the part: `values`, `scale`, `indices`, ...; everything but `values` is metadata.
"""

import abc
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Payload = dict[str, jax.Array]


class Compressor(abc.ABC):
    """A codec for flat float32 vectors; instances are frozen dataclasses (hashable, comparable).

    The theory constants are None where no bound holds for all vectors (expectations are over keys):
      alpha(size): contraction,  E||C(v) - v||^2 <= (1 - alpha) ||v||^2,
      omega(size): variance of an unbiased codec,  E C(v) = v,  E||C(v) - v||^2 <= omega ||v||^2.
    """

    def __init_subclass__(cls, **kwargs) -> None:
        """Every `encode`, whoever wrote it, is given a float32 vector."""
        super().__init_subclass__(**kwargs)
        if "encode" in vars(cls):
            cls.encode = _of_vector(cls.encode)

    @property
    def shared_key(self) -> bool:
        """True when every worker must draw with the same key (shared masks or shifts)."""
        return False

    @abc.abstractmethod
    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Payload:
        """Codes a finite vector of shape (d,); `key` is only needed by random codecs.

        Other dtypes (and NumPy's arrays) are cast to float32 first. The payload carries no
        gradient. What NaN and infinity decode to is unspecified (a code may hide them): check
        before. Codecs hold where the largest magnitude of the vector is zero or from 1e-33 to
        1e30: beyond, a scale may underflow to zero or overflow.

        Raises:
          ValueError: If x is no vector.
        """

    @abc.abstractmethod
    def decode(self, payload: Payload, size: int) -> jax.Array:
        """The float32 vector of shape (size,) that the payload stands for."""

    def decode_sum(
        self, payloads: Payload, size: int, coefficients: jax.Array | None = None
    ) -> jax.Array:
        """sum_i coefficient_i decode(payload_i) over n stacked payloads, shape (size,).

        `coefficients` has shape (n,); None means ones.
        """
        n = jax.tree.leaves(payloads)[0].shape[0]

        def one(i):
            x = self.decode(jax.tree.map(lambda p: p[i], payloads), size)
            return x if coefficients is None else coefficients[i] * x

        if n <= 16:  # one fused elementwise pass
            return sum((one(i) for i in range(1, n)), start=one(0))
        return jax.lax.fori_loop(1, n, lambda i, total: total + one(i), one(0))

    def encode_chunks(
        self, chunks: jax.Array, key: jax.Array | None = None, size: int | None = None
    ) -> Payload:
        """Codes the rows of (n, c) separately; payload leaves get the leading axis n.

        `size` is the true length of the vector the rows make up, when the rest of them is zero
        padding; codecs whose scale is a mean over the whole vector need it.
        """
        del size
        if key is None:
            return jax.vmap(self.encode)(chunks)
        return jax.vmap(self.encode)(chunks, jax.random.split(key, chunks.shape[0]))

    def payload_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every payload part for a vector of this size."""
        x = jax.ShapeDtypeStruct((size,), jnp.float32)
        return jax.eval_shape(self.encode, x, jax.eval_shape(lambda: jax.random.key(0)))

    def payload_bytes(self, size: int) -> int:
        """Bytes of one payload for a vector of `size` elements, metadata included."""
        return sum(
            math.prod(s.shape) * s.dtype.itemsize for s in self.payload_shapes(size).values()
        )

    def alpha(self, size: int) -> float | None:
        """Contraction constant in (0, 1] for vectors of this size, or None."""
        return None

    def omega(self, size: int) -> float | None:
        """Variance constant of an unbiased codec for vectors of this size, or None."""
        return None

    def roundtrip(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """decode(encode(x)) for an array of any shape and real dtype; keeps both.

        Its derivative is zero.
        """
        x = jnp.asarray(x)
        y = self.decode(self.encode(x.reshape(-1), key), x.size)
        return y.reshape(x.shape).astype(x.dtype)


def _of_vector(encode: Callable[..., Payload]) -> Callable[..., Payload]:
    """`encode` of x as a float32 vector that carries no gradient."""

    @functools.wraps(encode)
    def checked(self: Compressor, x: jax.Array, key: jax.Array | None = None) -> Payload:
        x = jax.lax.stop_gradient(jnp.asarray(x, jnp.float32))
        if x.ndim != 1:
            raise ValueError(
                f"encode: x must be a vector, of shape (d,), got shape {x.shape}; "
                "roundtrip takes any shape"
            )
        return encode(self, x, key)

    return checked


def require_key(key: jax.Array | None, name: str) -> jax.Array:
    """The key, or a clear error when a random codec was called without one."""
    if key is None:
        raise ValueError(f"{name} is random: encode and roundtrip need a PRNG key, got None")
    return key


def whole(value, least: int) -> bool:
    """Whether it is a whole number (4.0 is, nan is not) and not below `least`."""
    return bool(value >= least and value % 1 == 0)


def require_whole(name: str, value, least: int, most: int | None = None) -> int:
    """The value as an int, or a clear error when it is not whole or not in its range."""
    if not whole(value, least) or (most is not None and value > most):
        rule = f", at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{rule}, got {value}")
    return int(value)
