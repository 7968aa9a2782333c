"""A worker's loss on its share of the batch, and its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.collectives import axis
from jaxcomm.collectives.axis import AxisName
from jaxcomm.traffic.count import mentions


def differentiate(loss_fn: Callable, params, batch, key, axis_name: AxisName):
    """`((loss, metrics), gradient, params -> loss)`, all of them this worker's own.

    A scan that starts from zeros, or a branch that is a constant, is typed as equal on all workers
    where the other values vary, which shard_map refuses. A loss that does not communicate is then
    traced as one worker alone would trace it.
    """

    def run(fn):
        own = lambda params: fn(params, batch, key)
        value, grads = jax.value_and_grad(own, has_aux=True)(params)
        return value, grads, lambda params: own(params)[0]

    fn = lambda *args: _with_aux(loss_fn(*args))
    try:
        return run(fn)
    except TypeError as error:
        if axis.MISMATCH not in str(error):
            raise
        problem = error
    return run(_unaware(fn, axis_name, problem))


def _unaware(fn: Callable, axis_name: AxisName, problem: TypeError) -> Callable:
    """`fn` of values whose types do not say that they vary; raises the problem if it may matter."""

    def run(*args):
        args = axis.equal(args, axis_name)
        if mentions(jax.make_jaxpr(fn)(*args).jaxpr, axis.axes(axis_name)):
            raise problem
        return axis.different(fn(*args), axis_name)

    return run


def _with_aux(out):
    """(loss, dict of metrics) of whatever the loss function returned."""
    loss, aux = out if isinstance(out, tuple) else (out, {})
    if jnp.shape(loss) != ():
        raise ValueError(f"loss_fn must return a scalar loss, got shape {jnp.shape(loss)}")
    aux = aux if isinstance(aux, dict) else {"aux": aux}
    return loss, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), aux)
