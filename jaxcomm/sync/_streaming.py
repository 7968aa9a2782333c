r"""Streaming meetings: the tree in P fragments, each with its own time to meet.

Fragment p = 0 .. P-1 meets at t_p, t_p + H, t_p + 2H, ... with t_p = floor((p + 1) H / P):

    at t        D_i = z_p - x_i,p        z_p <- z_p + outer_p(D_i)        launched
    at t + tau  x_i,p <- alpha x_i,p + (1 - alpha) z_p                    delivered

so that 1/P of the bytes moves at a time, and for tau steps workers train on while it does. One
fragment with tau = alpha = 0 is `periodic`. Source: Douillard et al. 2025, "Streaming DiLoCo with
overlapping communication" (arXiv 2501.18512).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond
from jaxcomm.compressors._fp4 import fp4_e3m0
from jaxcomm.compressors.base import Compressor
from jaxcomm.sync._fragments import PATTERNS, Fragments, join, owners, split
from jaxcomm.sync._outer import downhill
from jaxcomm.sync._rule import Background, SyncRule, check_replicated, displacement, float32
from jaxcomm.sync._schedules import check_total_steps
from jaxcomm.transforms._average import average, compressed_average


class StreamingState(NamedTuple):
    """State of `streaming`; all replicated. P is the number of fragments."""

    anchor: optax.Params  # float32, like params: z; of a fragment on its way, what will arrive
    outer: tuple[optax.OptState, ...]  # of each fragment's outer chain
    next_sync: jax.Array  # shape=(P,), dtype=jnp.int32: local step of the next launch
    pending: jax.Array  # shape=(P,), dtype=jnp.int32: local step of delivery; 0 nothing on its way
    sync_step: jax.Array  # shape=(), dtype=jnp.int32: launches so far


def streaming(
    outer: optax.GradientTransformation,
    every: int,
    fragments: Fragments = 4,
    *,
    pattern: str = "strided",
    delay: int = 0,
    mixing: float | None = None,
    total_steps: int | None = None,
) -> SyncRule:
    """Meets fragment by fragment, with any outer transform, and delivers some steps later.

    Args:
      outer: a jaxcomm communication, or an Optax chain that contains one and ends in an optimizer;
        each fragment has its own state of it, and sees the others' leaves as optax.MaskedNode.
      every: H, local steps between two meetings of the same fragment.
      fragments: P; or, for each fragment, the paths (`blocks/block_00`) it is made of.
      pattern: how layers go to P fragments: 'strided', 'sequential' or 'balanced'.
      delay: tau, local steps between launch and delivery; less than H / P.
      mixing: alpha in [0, 1], the share of the worker's own parameters at delivery; default 0, or
        0.5 with a delay. 1 never listens.
      total_steps: length of the training; every fragment meets there once more and is adopted as
        it is, so that replicas end equal.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`.

    Raises:
      ValueError: delay >= H / P, an unknown pattern, mixing outside [0, 1], an outer chain that
        does not average; at init, fragments that do not cover the tree or outnumber its layers.
    """
    count = fragments if isinstance(fragments, int) else len(fragments)
    mixing = (0.5 if delay else 0.0) if mixing is None else float(mixing)
    _check(every, count, pattern, delay, mixing)
    check_total_steps(total_steps, "streaming")
    chain = downhill(outer, "streaming")
    place = lambda params: owners(params, fragments, pattern, "streaming")

    def init_fn(params):
        anchor = float32(params)
        states = tuple(chain.init(part) for part in split(anchor, place(params), count))
        offsets = jnp.asarray([(p + 1) * every // count for p in range(count)], jnp.int32)
        pending = jnp.zeros((count,), jnp.int32)
        first = _not_beyond(total_steps, offsets, 0)
        return StreamingState(anchor, states, first, pending, jnp.zeros((), jnp.int32))

    def clock(state, step):
        due = step >= state.next_sync
        pending = jnp.where(due, step + delay, state.pending)
        pending = _not_beyond(total_steps, pending, step - 1)
        next_sync = jnp.where(due, state.next_sync + every, state.next_sync)
        new = state._replace(
            next_sync=_not_beyond(total_steps, next_sync, step),
            pending=jnp.where(pending > step, pending, 0),
            sync_step=state.sync_step + jnp.sum(due, dtype=jnp.int32),
        )
        return new, due, pending == step

    def apply_fn(params, state, step):
        owner = place(params)
        launch = _launch(chain, step)
        parts, (new, due, arriving) = [], clock(state, step)
        own = split(params, owner, count)
        anchors = split(state.anchor, owner, count)
        share = jnp.where(step == total_steps, 0.0, mixing) if total_steps and mixing else mixing
        for p in range(count):
            anchor, outer = cond(due[p], launch, _stay, own[p], anchors[p], state.outer[p])
            mine = cond(arriving[p], _deliver(share), lambda x, z: x, own[p], anchor)
            parts.append((mine, anchor, outer))
        mine, anchors, outers = zip(*parts)
        new = new._replace(anchor=join(anchors, owner, params), outer=outers)
        return join(mine, owner, params), new

    def leave(params, state, slot):
        del state
        return split(params, place(params), count)[slot]

    def travel(parcel, state, slot, step):
        owner, outer = place(state.anchor), list(state.outer)
        anchors = split(state.anchor, owner, count)
        anchors[slot], outer[slot] = _launch(chain, step)(parcel, anchors[slot], outer[slot])
        return state._replace(anchor=join(anchors, owner, state.anchor), outer=tuple(outer))

    def arrive(params, state, result, slot, step):
        del step
        owner = place(params)
        own = split(params, owner, count)
        own[slot] = _deliver(mixing)(own[slot], result)
        return join(own, owner, params), state

    background = Background(
        slots=count,
        near=(),
        far=("anchor", "outer"),
        counters=("next_sync", "pending", "sync_step"),
        total_steps=total_steps,
        clock=clock,
        leave=leave,
        travel=travel,
        result=lambda state, slot: split(state.anchor, place(state.anchor), count)[slot],
        arrive=arrive,
        branches=lambda launched, arrived: [int(x) for xs in zip(launched, arrived) for x in xs],
    )
    return SyncRule(init_fn, apply_fn, background=background if delay else None)


def _launch(chain, step) -> Callable:
    """Moves a fragment's anchor by the outer transform of the workers' displacements."""

    def launch(params, anchor, outer):
        updates, outer = chain.update(displacement(anchor, params), outer, anchor, local_step=step)
        new = optax.apply_updates(anchor, updates)
        check_replicated(new, anchor, "streaming")
        return new, outer

    return launch


def _stay(params, anchor, outer):
    del params
    return anchor, outer


def _deliver(share) -> Callable:
    """x <- share x + (1 - share) z; with a share of 0 assigned, so that replicas are equal."""

    def leaf(x, z):
        if isinstance(share, float) and share == 0:
            return z.astype(x.dtype)
        mixed = share * x.astype(jnp.float32) + (1.0 - share) * z
        return jnp.where(share == 0, z, mixed).astype(x.dtype)

    return lambda params, anchor: jax.tree.map(leaf, params, anchor)


def _not_beyond(total_steps: int | None, next_sync, step):
    """What would come after the end of training comes at the end; beyond it nothing changes."""
    if total_steps is None:
        return next_sync
    return jnp.where(step < total_steps, jnp.minimum(next_sync, total_steps), next_sync)


def _check(every, count: int, pattern: str, delay: int, mixing: float) -> None:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"streaming: every must be a number of steps >= 1, got {every!r}")
    if not 1 <= count <= every:
        raise ValueError(f"streaming: fragments must be in [1, every={every}], got {count}")
    if pattern not in PATTERNS:
        raise ValueError(f"streaming: pattern must be one of {PATTERNS}, got {pattern!r}")
    if delay < 0 or delay * count >= every:
        raise ValueError(
            f"streaming: delay must be in [0, every / fragments) = [0, {every / count:g}), so that "
            f"a fragment is delivered before the next one leaves, got delay={delay}"
        )
    if not 0 <= mixing <= 1:
        raise ValueError(f"streaming: mixing must be in [0, 1], got {mixing}")


def streaming_diloco(
    axis_name: AxisName,
    every: int = 100,
    fragments: Fragments = 4,
    *,
    pattern: str = "strided",
    delay: int = 0,
    mixing: float | None = None,
    compressor: Compressor | None = fp4_e3m0(),
    exchange: str = "gather",
    outer_learning_rate: float = 0.4,
    outer_momentum: float = 0.9,
    total_steps: int | None = None,
) -> SyncRule:
    """Streaming DiLoCo: fragments, four bits a coordinate on the wire, sums in float32.

    Args:
      axis_name: name of the worker axis.
      every: H, local steps between two meetings of the same fragment.
      fragments: P; or, for each fragment, the paths it is made of (see `streaming`).
      pattern: 'strided', 'sequential' or 'balanced'.
      delay: tau, local steps between launch and delivery; less than H / P.
      mixing: share of the worker's own parameters at delivery; default 0, or 0.5 with a delay.
      compressor: codec of the displacements; None sends float32.
      exchange: 'gather' codes each displacement once and sends it to n - 1 workers;
        'two_phase' codes the mean of each chunk again, and sends 2 (n-1)/n payloads.
      outer_learning_rate: learning rate of the outer Nesterov SGD.
      outer_momentum: its momentum.
      total_steps: length of the training; every fragment meets there once more.

    Raises:
      ValueError: as `streaming`.
    """
    if compressor is None:
        mean = average(axis_name)
    else:
        mean = compressed_average(compressor, axis_name, exchange=exchange)
    step = optax.sgd(outer_learning_rate, momentum=outer_momentum, nesterov=True)
    return streaming(
        optax.chain(mean, step),
        every,
        fragments,
        pattern=pattern,
        delay=delay,
        mixing=mixing,
        total_steps=total_steps,
    )
