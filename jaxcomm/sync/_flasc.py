r"""FLASC: dense local training, sparse messages in both directions.

From the server's parameters z a worker starts at y = C_down(z), trains all of them densely, and

    D_i = y - x_i,   z <- z + outer((1/n) sum_i C_up(D_i)),   x_i <- C_down(z)

The two densities are independent; masking during the local training would hurt. z is dense and
replicated here, so that the download costs no bytes: C_down is what workers of a star would get,
and its effect on training. Meant for LoRA parameters (see `jaxcomm.lora_init`).

Sources: Kuo, Raje, Rajesh & Smith 2024, "FLASC: Federated LoRA with Sparse Communication" (arXiv
2406.05233); the same recipe is CELLM's.
"""

import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, flatten
from jaxcomm.compressors.base import Compressor
from jaxcomm.sync._periodic import is_due, periodic
from jaxcomm.sync._rule import SyncRule, adopt, adopt_if, displacement, float32
from jaxcomm.sync._schedules import Schedule
from jaxcomm.transforms._average import compressed_average
from jaxcomm.transforms.common import check_compressor


def flasc(
    upload: Compressor,
    axis_name: AxisName,
    every: Schedule | int,
    *,
    download: Compressor | None = None,
    outer: optax.GradientTransformation | None = None,
    total_steps: int | None = None,
) -> SyncRule:
    """Sparse uploads of dense local training, and a sparse start of the next round.

    Args:
      upload: codec of the displacements, e.g. top_k(0.25).
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps.
      download: codec of the parameters that a round starts from, deterministic, e.g. top_k(0.5);
        None starts from all of them. The first round does.
      outer: the server's optimizer, e.g. optax.adam(1e-3); None is optax.sgd(1.0).
      total_steps: length of the training; the last round ends there.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`. What is evaluated (`step.consensus`) after the
      first meeting is `state.sync_state.anchor`, the server's parameters; the workers' own are
      those of the sparse download.

    Example:
      >>> import jaxcomm, optax
      >>> rule = jaxcomm.flasc(
      ...     jaxcomm.top_k(0.25), "workers", every=10, download=jaxcomm.top_k(0.5),
      ...     outer=optax.adam(1e-3))
    """
    check_compressor(upload, "flasc")
    chain = optax.chain(compressed_average(upload, axis_name), outer or optax.sgd(1.0))
    rule = periodic(chain, every, total_steps=total_steps)._replace(evaluated=_server)
    if download is None:
        return rule
    check_compressor(download, "flasc")

    def received(anchor):
        vector, unflatten = flatten(anchor)
        return unflatten(download.decode(download.encode(vector), vector.size))

    def apply_fn(params, state, step):
        def meet(params, state):
            vector, unflatten = flatten(state.anchor)
            dense = flatten(received(state.anchor))[0]
            start = unflatten(jnp.where(state.sync_step == 0, vector, dense))
            # displaced from what the worker started from, as the rule displaces from the anchor
            moved = displacement(state.anchor, displacement(start, params))
            _, state = rule.apply(moved, state, step)
            return adopt(received(float32(state.anchor)), params), state

        return cond(is_due(state, step), meet, lambda *same: same, params, state)

    return rule._replace(apply=apply_fn)


def _server(params, state):
    return adopt_if(state.sync_step > 0, state.anchor, params)
