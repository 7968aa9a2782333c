"""A barrier that XLA does not fuse across.

What is cheap to compute once is dear where XLA computes it anew for each element that uses it, or
finds each element's place in a reshaped array by a division.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_fence = Primitive("jaxcomm_fence")
_fence.def_impl(lambda x: x)
_fence.def_abstract_eval(lambda x: x)


def fence(x: jax.Array) -> jax.Array:
    """x, computed before what uses it; any shape and dtype, of numbers or not."""
    return _fence.bind(x) if x.size and jnp.issubdtype(x.dtype, jnp.number) else x


def _loop(x):
    """The CPU compiler drops an optimization barrier: a loop that never runs, as XLA does not know
    that nothing is larger than infinity. Elsewhere its condition might be read by the host.
    """
    never = lambda x: x[(0,) * x.ndim].astype(jnp.float32) > jnp.inf
    return lax.while_loop(never, lambda x: -x, x)


mlir.register_lowering(_fence, mlir.lower_fun(lax.optimization_barrier, multiple_results=False))
mlir.register_lowering(_fence, mlir.lower_fun(_loop, multiple_results=False), platform="cpu")
batching.primitive_batchers[_fence] = lambda args, axes: (fence(*args), *axes)
ad.primitive_jvps[_fence] = lambda primals, tangents: (fence(*primals), *tangents)
