"""Is an outer chain one? It must average over workers, and its updates must point downhill.

A chain hides what is in it, so it is tried out once, when the rule is built, on a small tree with
one simulated worker. Where that is not possible (transforms made for the tree of the real
parameters) nothing is refused here; a chain without a collective is then found by its types when
the step is traced.
"""

import re

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import axis
from jaxcomm.transforms.common import Communication

_UNBOUND = re.compile(r"axis_name='([^']+)' is not bound|unbound axis name:? '?([^\s'.]+)")
_MOST_AXES = 4


def downhill(
    outer: optax.GradientTransformation, where: str
) -> optax.GradientTransformationExtraArgs:
    """The outer chain with updates that are added to the anchor.

    A bare communication keeps the direction of its input, the displacement: it is subtracted.

    Raises:
      ValueError: the chain has no collective, or its updates point along the displacement.
    """
    if isinstance(outer, Communication):
        return optax.with_extra_args_support(optax.chain(outer, optax.scale(-1.0)))
    chain = optax.with_extra_args_support(outer)
    if axis.bound():  # built inside a mapped function: cannot be tried out
        return chain
    names, along = _try_out(chain)
    if names == ():
        raise ValueError(
            f"{where}: the outer chain does not average over the workers; start it with "
            "jaxcomm.average(axis_name)"
        )
    if along is not None and along > 0:
        raise ValueError(
            f"{where}: the outer chain would move the anchor away from the workers; end it with an "
            "optimizer, for example optax.sgd(1.0)"
        )
    return chain


def check_communication(outer, where: str) -> optax.GradientTransformationExtraArgs:
    """A transform that averages and keeps the direction of its input; a bare one or a chain.

    Raises:
      ValueError: it has no collective, or points against its input.
    """
    chain = optax.with_extra_args_support(outer)
    names, along = (None, None) if axis.bound() else _try_out(chain)
    if names == ():
        raise ValueError(
            f"{where}: the communication does not average over the workers; use "
            "jaxcomm.average(axis_name)"
        )
    if along is not None and along < 0:
        raise ValueError(
            f"{where}: the communication turns its input around; leave the optimizer to outer="
        )
    return chain


def check_optimizer(outer, where: str) -> optax.GradientTransformationExtraArgs:
    """A transform without collectives whose updates point downhill.

    Raises:
      ValueError: it communicates, or its updates point along its input.
    """
    chain = optax.with_extra_args_support(outer)
    names, along = (None, None) if axis.bound() else _try_out(chain)
    if names:
        raise ValueError(
            f"{where}: the outer optimizer must not communicate (it does over "
            f"{', '.join(map(repr, names))}); give that part as communication="
        )
    if along is not None and along > 0:
        raise ValueError(
            f"{where}: the outer optimizer would move the anchor away from the workers; end it "
            "with optax.scale_by_learning_rate or use one such as optax.sgd(1.0)"
        )
    return chain


def _try_out(chain) -> tuple[tuple[str, ...] | None, float | None]:
    """The axes that the chain communicates over, and how far a first update goes along its input.

    None for what could not be found out.
    """

    def along(_):
        ones = {"matrix": jnp.ones((64, 64)), "vector": jnp.ones((64,))}
        zeros = jax.tree.map(jnp.zeros_like, ones)
        updates, _ = chain.update(ones, chain.init(zeros), zeros, local_step=jnp.int32(1))
        return optax.tree.sum(updates)

    names: tuple[str, ...] = ()
    while True:
        mapped = along
        for name in names:
            mapped = jax.vmap(mapped, axis_name=name)
        dummy = jnp.zeros((1,) * len(names))
        try:
            jax.eval_shape(mapped, dummy)
            break
        except Exception as error:
            found = _UNBOUND.search(str(error))
            if found is None or len(names) == _MOST_AXES:
                return None, None
            names = (*names, found[1] or found[2])
    try:
        return names, float(jax.jit(mapped)(dummy).sum())
    except Exception:  # it holds values of a surrounding trace
        return names, None
