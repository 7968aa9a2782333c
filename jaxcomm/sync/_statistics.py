"""Statistics of activations (BatchNorm's) belong to one set of weights: after an average of weights
they are estimated anew, not averaged."""

from collections.abc import Callable

import jax

from jaxcomm.collectives import AxisName, mean


def reestimate(statistics_fn: Callable, params, batches, *, axis_name: AxisName | None = None):
    """The mean of a model's batch statistics over some batches.

    Args:
      statistics_fn: `statistics_fn(params, batch)` returns a tree of floating-point arrays, such as
        the mean and the mean square of every normalised activation (a variance is not the mean of
        variances).
      params: the weights after a meeting.
      batches: pytree whose leaves have a leading axis: one entry a batch; some 100 are usual.
      axis_name: also average over the workers of this axis; None for these batches alone.
    """
    found = jax.lax.map(lambda batch: statistics_fn(params, batch), batches)
    average = jax.tree.map(lambda x: x.mean(0), found)
    return average if axis_name is None else mean(average, axis_name)
