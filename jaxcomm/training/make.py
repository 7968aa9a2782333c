"""`make_train_step`: the one way to a step, with or without a background channel."""

from collections.abc import Callable

import optax
from jax.sharding import Mesh

from jaxcomm.collectives.axis import AxisName
from jaxcomm.sync._rule import SyncRule
from jaxcomm.training.background import BackgroundStep
from jaxcomm.training.overlap import JoinedStep, OverlappedStep
from jaxcomm.training.step import TrainStep
from jaxcomm.training.workers import Workers


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    sync: SyncRule | None = None,
    mesh: Mesh | None = None,
    simulate: int | tuple[int, ...] | None = None,
    pmap: int | None = None,
    donate: bool = True,
    background: bool = False,
) -> TrainStep:
    """Builds the step of a data-parallel training, for any Optax chain and sync rule.

    Args:
      loss_fn: `loss_fn(params, batch, key)` of one worker; returns a scalar, or `(scalar, aux)`
        with aux a dict of scalars (or an array or tree, reported as metrics['aux']); the names
        'loss', 'skipped' and 'branches' are the step's own.
      tx: Optax chain with a jaxcomm transform in it, or any Optax optimizer with `sync`.
      axis_name: name of the worker axis (or a tuple of names).
      sync: when and how replicas meet; None for methods that exchange gradients.
      mesh: run under shard_map on this mesh (default: all devices along the axis).
      simulate: run this many workers on one device under vmap.
      pmap: run under pmap on so many local devices.
      donate: reuse the buffers of the state given to a step, or (on CPU) free them after it.
      background: make the transfers of an overlapped sync rule on CPU devices of the same hosts
        while the others compute (`jaxcomm.training.background`); needs one beside each worker's.
        Without a rule: run the collectives of a step between CPU hosts beside its computation
        (`jaxcomm.training.overlap`); give transforms a `bucket_bytes`, so that there are several.

    Returns:
      A TrainStep: `state = step.init(params, key)`, `state, metrics = step(state, batch)`,
      `step.consensus(state)`.

    Raises:
      ValueError: contradictory modes, an axis that the mesh does not have, or a background for
        a rule without one or for simulated workers that exchange gradients; later, from `init`: a
        tx that never communicates, without a sync rule; or with one, a tx whose exchanges wait for
        a count of its updates, as those of `accumulate` and `one_bit_adam` do.
      TypeError: tx is no transform, or sync no rule.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxcomm
      >>> tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=1), axis_name="workers"), optax.sgd(0.1))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=4)
      >>> state = step.init(jnp.zeros(3), jax.random.key(0))
      >>> state, metrics = step(state, jnp.ones((8, 3)))
      >>> float(metrics["loss"])
      1.0
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"make_train_step: tx must be an Optax transform, got {tx!r}")
    if sync is not None and not isinstance(sync, SyncRule):
        raise TypeError(
            f"make_train_step: sync must be a sync rule such as local_sgd(axis, 8), got {sync!r}"
        )
    workers = Workers(axis_name, mesh, simulate, pmap)
    if sync is None:
        kind = OverlappedStep if background else JoinedStep if workers.on_hosts else TrainStep
    else:
        kind = BackgroundStep if background else TrainStep
    return kind(loss_fn, tx, workers, sync, donate)
