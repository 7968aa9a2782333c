"""EF21: every worker sends the compressed change of its gradient estimate.

    c_i = C(v_i - g_i),   g_i <- g_i + c_i,   g <- g + (1/n) sum_i c_i,   u = g

v_i is the worker's gradient, or its moving average v_i <- (1 - eta) v_i + eta grad (EF21-SGDM), or
the moving average of that (EF21-SGD2M). g_i starts at zero, so the first message is C(grad). With
weights w_i (EF21-W) v_i is divided by n w_i and u = sum_i w_i g_i. With participation p (EF21-PP) a
worker takes part with probability p, drawn from a key that all share; the mean still divides by n.
With a downlink codec (EF21-BC) the applied direction h follows g by compressed differences,
h <- h + C_M(g - h), equal on all workers.

Other members are chains: heavy ball (EF21-HB) is `chain(ef21(...), optax.trace(eta),
optax.scale(-gamma))`, EF21-Prox ends in `proximal_step`, EF21-PAGE begins with `page`.

On the wire every worker has its slot in one all-gather of c_i: an absent worker (PP) fills it
with a message that counts zero times, and the downlink of BC costs nothing, as all replicas
know g; both show what happens when a server forwards, at the price of plain EF21.

Sources: Richtarik, Sokolov & Fatkhullin 2021 (arXiv 2106.05203); Fatkhullin et al. 2021, "EF21 with
Bells & Whistles" (arXiv 2110.03294); Fatkhullin, Tyurin & Richtarik 2023, "Momentum Provably
Improves Error Feedback!" (arXiv 2305.15155); Richtarik, Gasanov & Burlachenko 2024, "Error Feedback
Reloaded" (arXiv 2402.10774). Step sizes: `jaxcomm.ef21_step_size` and its neighbours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxcomm.collectives import AxisName, Exchanged, dense_mean, flatten, gather_mean, index, size
from jaxcomm.collectives.flatten import zeros_like_float32
from jaxcomm.compressors._identity import Identity
from jaxcomm.compressors.base import Compressor
from jaxcomm.transforms.common import Communication, check_compressor, message_key, zero_count


class EF21State(NamedTuple):
    """Gradient estimates; all float32 trees like params."""

    count: jax.Array  # shape=(), dtype=jnp.int32
    local: optax.Updates  # per worker: g_i
    mean: optax.Updates  # replicated: g = (1/n) sum_i g_i, or sum_i w_i g_i
    momentum: optax.Updates | None  # per worker: v_i, if momentum is given
    second_momentum: optax.Updates | None  # per worker: the average of v_i, if double_momentum
    applied: optax.Updates | None  # replicated: h, if a downlink codec is given


def ef21(
    compressor: Compressor,
    axis_name: AxisName,
    *,
    momentum: float | None = None,
    double_momentum: bool = False,
    weight: jax.Array | None = None,
    participation: float | None = None,
    downlink: Compressor | None = None,
    seed: int = 0,
) -> Communication:
    r"""The EF21 family of error feedback, as a gradient transform.

    .. math:: c_i = C(v_i - g_i),\quad g_i \leftarrow g_i + c_i,\quad
      u = \tfrac1n \sum_i g_i

    Args:
      compressor: contractive codec C, e.g. top_k(0.01).
      axis_name: name of the worker axis.
      momentum: eta in (0, 1] of EF21-SGDM; None compresses the gradient itself. The average follows
        the gradient also on workers that do not take part.
      double_momentum: average twice (EF21-SGD2M); needs `momentum`.
      weight: shape (n,), positive, sum 1: the w_i of EF21-W; None is 1/n each.
      participation: probability in (0, 1] that a worker sends (EF21-PP); None is everyone.
      downlink: codec C_M of EF21-BC; None applies g itself.
      seed: seeds the keys of random codecs and of the participation mask.

    Returns:
      An Optax transform whose output is the estimate of the mean gradient.

    Raises:
      ValueError: momentum or participation outside (0, 1], double_momentum without momentum,
        weights that are not positive, do not sum to 1, or are not n.

    Example:
      >>> import jax.numpy as jnp, jax, optax, jaxcomm
      >>> tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=1), "workers"), optax.sgd(0.25))
      >>> step = jaxcomm.make_train_step(
      ...     lambda x, batch, key: jnp.sum((x - batch) ** 2), tx, axis_name="workers", simulate=2)
      >>> state = step.init(jnp.array([3.0, 1.0]), jax.random.key(0))
      >>> state, metrics = step(state, jnp.zeros((2, 2)))
      >>> state.params.tolist()  # only the larger coordinate has been sent
      [1.5, 1.0]

    References:
      Richtarik, Sokolov & Fatkhullin, EF21, arXiv 2106.05203.
    """
    check_compressor(compressor, "ef21")
    if downlink is not None:
        check_compressor(downlink, "ef21: downlink")
    for name, value in (("momentum", momentum), ("participation", participation)):
        if isinstance(value, (int, float)) and not 0 < value <= 1:
            raise ValueError(f"ef21: {name} must be in (0, 1], got {value}")
    if double_momentum and momentum is None:
        raise ValueError("ef21: double_momentum needs momentum, got None")
    _check_weight(weight)

    def init_fn(params) -> Any:
        zeros = lambda: zeros_like_float32(params)
        return EF21State(
            count=zero_count(),
            local=zeros(),
            mean=zeros(),
            momentum=None if momentum is None else zeros(),
            second_momentum=zeros() if double_momentum else None,
            applied=None if downlink is None else zeros(),
        )

    def update_fn(updates, state, params=None, **extra) -> Any:
        del params, extra
        gradient, unflatten = flatten(updates)
        memory = lambda vector: unflatten(vector, jnp.float32)
        local, mean = flatten(state.local)[0], flatten(state.mean)[0]
        key = message_key(seed, state.count, axis_name, compressor)

        first = second = None
        if momentum is not None:
            first = _moving_average(state.momentum, gradient, momentum, state.count)
        if double_momentum:
            second = _moving_average(state.second_momentum, first, momentum, state.count)
        target = next(x for x in (second, first, gradient) if x is not None)
        me, shares, present = _mask(weight, participation, seed, state.count, axis_name)
        message = target - local if shares is None else target / shares[me] - local
        coefficients = _product(shares, present)
        result = _send(message, compressor, axis_name, key, coefficients)
        sent = result.sent if present is None else present[me] * result.sent
        mean = mean + result.mean
        applied = None
        if downlink is not None:
            applied = flatten(state.applied)[0]
            applied = applied + downlink.roundtrip(
                mean - applied, jax.random.fold_in(jax.random.key(seed), -1 - state.count)
            )
        new = EF21State(
            count=state.count + 1,
            local=memory(local + sent),
            mean=memory(mean),
            momentum=None if first is None else memory(first),
            second_momentum=None if second is None else memory(second),
            applied=None if applied is None else memory(applied),
        )
        return unflatten(mean if applied is None else applied), new

    return Communication(init_fn, update_fn)


def _moving_average(memory, value, rate, count):
    """(1 - rate) memory + rate value, flat; the first value itself at the start."""
    old = flatten(memory)[0]
    return jnp.where(count == 0, value, old + rate * (value - old))


def _check_weight(weight) -> None:
    if weight is None or isinstance(weight, Tracer):
        return
    values = np.asarray(weight, np.float64)
    if not (values > 0).all() or abs(values.sum() - 1) > 1e-3:
        raise ValueError(f"ef21: weight must be positive and sum to 1, got {weight}")


def _mask(weight, participation, seed, count, axis_name):
    """This worker's index, everyone's n w_i and everyone's presence (None where trivial)."""
    n, shares, present = size(axis_name), None, None
    if weight is not None:
        shares = n * jnp.asarray(weight, jnp.float32)
        if shares.shape != (n,):
            raise ValueError(f"ef21: weight must have shape ({n},), got {shares.shape}")
    if participation is not None:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), 2**31 - 1)
        present = jax.random.bernoulli(key, participation, (n,)).astype(jnp.float32)
    return index(axis_name), shares, present


def _product(a, b):
    return b if a is None else a if b is None else a * b


def _send(message, compressor, axis_name, key, coefficients) -> Exchanged:
    """(1/n) sum_i coefficient_i C(message_i), and this worker's own C(message_i)."""
    if not isinstance(compressor, Identity):
        return gather_mean(message, compressor, axis_name, key, coefficients)
    weighted = message if coefficients is None else coefficients[index(axis_name)] * message
    return Exchanged(dense_mean(weighted, axis_name), message)
