"""A transform that sees the whole tree as one vector, for models of very many small leaves.

Every operation on a leaf costs a kernel, and memories are trees like the parameters, which an
exchange joins and cuts again. As vectors they stay as they are from step to step.

`optax.flatten` does the same; here leaves are joined and cut in groups, as XLA on CPU compiles a
kernel for every slice at another place.
"""

import optax

from jaxcomm.collectives import flatten
from jaxcomm.transforms.common import Communication


def flattened(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives a transform one float32 vector instead of a tree.

    Args:
      tx: a transform, or a chain of them, that does the same to a tree and to its leaves joined:
        not one that looks at leaves, such as `power_sgd`, `one_bit_lamb`, a mask or a norm of each.

    Returns:
      An Optax transform whose state has vectors of shape (d,) where tx has trees; bare
      communication stays one. Updates have the dtypes of its input.

    Raises:
      TypeError: (init and update) a leaf is not a real floating-point array.

    Example:
      >>> import jaxcomm, optax
      >>> tx = jaxcomm.flattened(
      ...     optax.chain(jaxcomm.ef21(jaxcomm.top_k(0.01), "workers"), optax.adam(1e-3)))
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params):
        return inner.init(flatten(params)[0])

    def update_fn(updates, state, params=None, **extra):
        vector, unflatten = flatten(updates)
        params = None if params is None else flatten(params)[0]
        vector, state = inner.update(vector, state, params, **extra)
        return unflatten(vector), state

    kind = Communication if isinstance(tx, Communication) else optax.GradientTransformationExtraArgs
    return kind(init_fn, update_fn)
