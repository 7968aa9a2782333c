r"""Controlled averaging for clients that differ: SCAFFOLD, and SCALLION and SCAFCOM, compressed.

Each of N clients keeps a control c_i, all keep c = mean c_i. K local steps with rates eta_k:

    y_i <- x,   y_i <- y_i - eta_k (g_i(y_i) - c_i + c),   q_i = (x - y_i) / sum_k eta_k

where the sum in q_i is over the steps that client i has not skipped (for a non-finite gradient), so
that q_i - c is the mean gradient minus c_i. Every sampled client sends one vector, C(d_i):

    SCALLION    d_i = a (q_i - c)                                      C unbiased
    SCAFCOM     v_i <- v_i + b (q_i + c_i - c - v_i),  d_i = v_i - c_i     C contractive
    c_i <- c_i + C(d_i)
    x <- x - eta_g (sum_k eta_k) (1/S sum C(d_i) + c),   c <- c + 1/N sum C(d_i)

with sums over the S sampled clients, and the old c in x. SCAFFOLD (its option II) is SCALLION with
the identity and a = 1: one vector up instead of two. Other clients keep c_i and v_i; so does a
sampled one that has done no step in the round, whose d_i is 0.

Sources: Karimireddy et al. 2020 (SCAFFOLD, arXiv 1910.06378); Huang, Li & Li 2024, "Stochastic
Controlled Averaging for Federated Learning with Communication Compression" (arXiv 2308.08165).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, cond, dense_mean, flatten, gather_mean, index, size
from jaxcomm.collectives.flatten import zeros_like_float32
from jaxcomm.compressors._identity import Identity
from jaxcomm.compressors.base import Compressor
from jaxcomm.sync._periodic import is_due
from jaxcomm.sync._rule import SyncRule, adopt, all_finite, displacement, float32
from jaxcomm.sync._schedules import Schedule, as_schedule, check_total_steps, round_end
from jaxcomm.transforms.common import check_compressor, message_key


class ScaffoldState(NamedTuple):
    """State of controlled averaging; trees are float32, like params."""

    anchor: optax.Params  # replicated: x
    control: optax.Updates  # replicated: c
    own_control: optax.Updates  # per worker: c_i
    momentum: optax.Updates | None  # per worker: v_i; SCAFCOM only
    rates: jax.Array  # shape=(), dtype=jnp.float32: sum of this round's rates so far
    own_rates: jax.Array  # shape=(), dtype=jnp.float32; per worker: of the steps it has done
    next_sync: jax.Array  # shape=(), dtype=jnp.int32: local step at which this round ends
    sync_step: jax.Array  # shape=(), dtype=jnp.int32: meetings so far


def scaffold(
    axis_name: AxisName,
    every: Schedule | int,
    learning_rate: Callable | float,
    *,
    global_learning_rate: float = 1.0,
    participants: int | None = None,
    seed: int = 0,
    total_steps: int | None = None,
) -> SyncRule:
    """SCAFFOLD: local steps corrected by control variates; dense.

    Args:
      axis_name: name of the worker axis; each worker is a client.
      every: K, a schedule or a number of local steps.
      learning_rate: rate or schedule of the inner optimizer, which must be plain SGD.
      global_learning_rate: eta_g.
      participants: S, how many clients, drawn anew each round, count; None is everyone.
      seed: seeds the draws.
      total_steps: length of the training; the last round ends there.

    Returns:
      A SyncRule for `make_train_step(loss_fn, optax.sgd(learning_rate), sync=...)`.

    Raises:
      ValueError: participants < 1; when traced, more participants than workers.
    """
    return _controlled(
        Identity(), axis_name, every, learning_rate, global_learning_rate, participants, seed,
        total_steps, scaling=1.0, name="scaffold",
    )  # fmt: skip


def scallion(
    compressor: Compressor,
    axis_name: AxisName,
    every: Schedule | int,
    learning_rate: Callable | float,
    *,
    scaling: float = 0.1,
    global_learning_rate: float = 1.0,
    participants: int | None = None,
    seed: int = 0,
    total_steps: int | None = None,
) -> SyncRule:
    """SCALLION: SCAFFOLD with one unbiasedly compressed vector up.

    Args:
      compressor: unbiased codec, for example quantize(4, rounding='stochastic').
      axis_name: name of the worker axis; each worker is a client.
      every: K, a schedule or a number of local steps.
      learning_rate: rate or schedule of the inner optimizer, which must be plain SGD.
      scaling: a in (0, 1].
      global_learning_rate: eta_g.
      participants: S, how many clients, drawn anew each round, count; None is everyone.
      seed: seeds the draws, and the keys of random codecs.
      total_steps: length of the training; the last round ends there.

    Raises:
      ValueError: scaling outside (0, 1], participants < 1.
    """
    _check_share("scallion", "scaling", scaling)
    return _controlled(
        compressor, axis_name, every, learning_rate, global_learning_rate, participants, seed,
        total_steps, scaling=scaling, name="scallion",
    )  # fmt: skip


def scafcom(
    compressor: Compressor,
    axis_name: AxisName,
    every: Schedule | int,
    learning_rate: Callable | float,
    *,
    momentum: float = 0.2,
    global_learning_rate: float = 1.0,
    participants: int | None = None,
    seed: int = 0,
    total_steps: int | None = None,
) -> SyncRule:
    """SCAFCOM: SCAFFOLD with one contractively compressed vector up, and client momentum.

    Args:
      compressor: any codec, for example top_k(0.01).
      axis_name: name of the worker axis; each worker is a client.
      every: K, a schedule or a number of local steps.
      learning_rate: rate or schedule of the inner optimizer, which must be plain SGD.
      momentum: b in (0, 1], the weight of the new gradient.
      global_learning_rate: eta_g.
      participants: S, how many clients, drawn anew each round, count; None is everyone.
      seed: seeds the draws, and the keys of random codecs.
      total_steps: length of the training; the last round ends there.

    Raises:
      ValueError: momentum outside (0, 1], participants < 1.
    """
    _check_share("scafcom", "momentum", momentum)
    return _controlled(
        compressor, axis_name, every, learning_rate, global_learning_rate, participants, seed,
        total_steps, momentum=momentum, name="scafcom",
    )  # fmt: skip


def _check_share(where: str, name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{where}: {name} must be in (0, 1], got {value}")


def _controlled(
    compressor, axis_name, every, learning_rate, global_learning_rate, participants, seed,
    total_steps, *, scaling=1.0, momentum=None, name,
) -> SyncRule:  # fmt: skip
    check_compressor(compressor, name)
    if participants is not None and participants < 1:
        raise ValueError(f"{name}: participants must be at least 1, got {participants}")
    schedule = as_schedule(every, name)
    check_total_steps(total_steps, name)
    rate = learning_rate if callable(learning_rate) else lambda step: learning_rate

    def init_fn(params):
        zeros = lambda: zeros_like_float32(params)
        zero = jnp.zeros((), jnp.int32)
        return ScaffoldState(
            anchor=float32(params),
            control=zeros(),
            own_control=zeros(),
            momentum=None if momentum is None else zeros(),
            rates=jnp.zeros((), jnp.float32),
            own_rates=jnp.zeros((), jnp.float32),
            next_sync=round_end(schedule, zero, total_steps),
            sync_step=zero,
        )

    def adjust_fn(grads, params, state, step, obj_fn):
        del params, obj_fn
        eta = jnp.asarray(rate(step), jnp.float32)
        own_rates = state.own_rates + jnp.where(all_finite(grads), eta, 0.0)
        correct = lambda g, c, own: (g + (c - own)).astype(g.dtype)
        grads = jax.tree.map(correct, grads, state.control, state.own_control)
        return grads, state._replace(rates=state.rates + eta, own_rates=own_rates)

    def meet(params, state, step):
        gradient, unflatten = flatten(displacement(state.anchor, params))
        control, own = flatten(state.control)[0], flatten(state.own_control)[0]
        done = state.own_rates > 0
        gradient = gradient * jnp.where(done, 1.0 / state.own_rates, 0.0)  # q_i
        present, share = _sample(participants, seed, state.sync_step, axis_name, name)
        memory = None
        if momentum is None:
            message = scaling * (gradient - control)
        else:
            old = flatten(state.momentum)[0]
            weight = momentum * present[index(axis_name)] * done
            memory = old + weight * (gradient + own - control - old)
            message = memory - own
        key = message_key(seed, state.sync_step, axis_name, compressor)
        mean, sent = _send(jnp.where(done, message, 0.0), compressor, axis_name, key, present)
        anchor = flatten(state.anchor)[0]
        anchor = anchor - global_learning_rate * state.rates * (mean / share + control)
        new = ScaffoldState(
            anchor=unflatten(anchor),
            control=unflatten(control + mean),
            own_control=unflatten(own + sent),
            momentum=None if memory is None else unflatten(memory),
            rates=jnp.zeros((), jnp.float32),
            own_rates=jnp.zeros((), jnp.float32),
            next_sync=round_end(schedule, step, total_steps),
            sync_step=state.sync_step + 1,
        )
        return adopt(new.anchor, params), new

    def apply_fn(params, state, step):
        met = lambda params, state: meet(params, state, step)
        return cond(is_due(state, step), met, lambda *same: same, params, state)

    return SyncRule(init_fn, apply_fn, adjust_fn)


def _sample(participants, seed: int, number, axis_name: AxisName, name: str):
    """Who counts in this round, float32 (N,) of 0 and 1, and the share S / N of them."""
    n = size(axis_name)
    if participants is None:
        return jnp.ones((n,), jnp.float32), 1.0
    if participants > n:
        raise ValueError(f"{name}: participants={participants}, but there are only {n} workers")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), 2**31 - 1)
    chosen = jax.random.permutation(key, n) < participants
    return chosen.astype(jnp.float32), participants / n


def _send(message, compressor, axis_name, key, present):
    """(1/N) sum_i present_i C(message_i), replicated, and this worker's present C(message)."""
    mine = present[index(axis_name)]
    if isinstance(compressor, Identity):
        return dense_mean(mine * message, axis_name), mine * message
    result = gather_mean(message, compressor, axis_name, key, present)
    return result.mean, mine * result.sent
