r"""Training apart and merging late: lo-fi, and gossip with a single final merge.

After every round of local steps workers are paired at random, each pair averages with probability
R, x_i <- (x_i + x_j) / 2; at the end of training all average once. The mean over the workers never
changes by it, and for even n a round shrinks E||x_i - mean||^2 by 1 - R n / (2 (n - 1)). R = 0 is
lo-fi.

Sources: Wortsman et al. 2022, lo-fi (arXiv 2210.11948); Zhu et al. 2025, "On the Surprising
Effectiveness of a Single Global Merging in Decentralized Learning" (arXiv 2507.06542).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm.collectives import cond, flatten, index, mean, size
from jaxcomm.collectives.pairs import matchings
from jaxcomm.collectives.primitives import permute
from jaxcomm.sync._periodic import is_due, local_sgd
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._schedules import Schedule, as_schedule, check_total_steps, round_end


class MergeState(NamedTuple):
    """State of `single_merge`; replicated. There is no anchor: the parameters are all there is."""

    next_sync: jax.Array  # shape=(), dtype=jnp.int32: local step at which this round ends
    sync_step: jax.Array  # shape=(), dtype=jnp.int32: rounds so far


def lo_fi(axis_name: str, total_steps: int) -> SyncRule:
    """lo-fi: workers train apart from one start, and average once, at the end.

    Args:
      axis_name: name of the worker axis.
      total_steps: length of the training, in local steps.
    """
    return local_sgd(axis_name, total_steps, total_steps=total_steps)


def single_merge(
    axis_name: str,
    every: Schedule | int,
    *,
    total_steps: int,
    probability: float | Callable = 0.2,
    coin: str = "pair",
    window: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> SyncRule:
    """Random pairs average after each round, everyone at the end.

    Args:
      axis_name: name of the worker axis.
      every: a schedule or a number of local steps a round.
      total_steps: length of the training; everyone averages there.
      probability: R, or a function of the round's number (int32, from 0) that gives it.
      coin: 'pair' tosses one for each pair; 'round' one for all, so that no bytes move where it
        fails (with 'pair' all exchange if one pair does). The expected shrinkage is the same.
      window: rounds (first, last + 1) after which everyone averages, too.
      seed: seeds matchings and coins, which all workers share.

    Returns:
      A SyncRule for `make_train_step(..., sync=)`.

    Raises:
      ValueError: a probability outside [0, 1], or an unknown coin.
    """
    if coin not in ("pair", "round"):
        raise ValueError(f"single_merge: coin must be 'pair' or 'round', got {coin!r}")
    if not callable(probability) and not 0 <= probability <= 1:
        raise ValueError(f"single_merge: probability must be in [0, 1], got {probability}")
    schedule = as_schedule(every, "single_merge")
    check_total_steps(total_steps, "single_merge")

    def init_fn(params):
        del params
        zero = jnp.zeros((), jnp.int32)
        return MergeState(round_end(schedule, zero, total_steps), zero)

    def apply_fn(params, state, step):
        def meet(params, state):
            number = state.sync_step
            chance = probability(number) if callable(probability) else probability
            key = jax.random.fold_in(jax.random.key(seed), number)
            everyone = (step == total_steps) | ((number >= window[0]) & (number < window[1]))
            params = cond(
                everyone,
                lambda x: mean(x, axis_name),
                lambda x: _gossip(x, axis_name, key, chance, coin),
                params,
            )
            return params, MergeState(round_end(schedule, step, total_steps), number + 1)

        return cond(is_due(state, step), meet, lambda *same: same, params, state)

    return SyncRule(init_fn, apply_fn)


def _gossip(params, axis_name: str, key: jax.Array, chance, coin: str):
    """One of the tournament's matchings, in which pairs with a coin average."""
    tournament = matchings(size(axis_name))
    draw, toss = jax.random.split(key)
    choice = jax.random.randint(draw, (), 0, max(len(tournament), 1))
    coins = jax.random.bernoulli(toss, chance, (size(axis_name),) if coin == "pair" else ())
    for number, partners in enumerate(tournament):
        firsts = jnp.asarray([min(i, j) for i, j in enumerate(partners)])
        active = coins[firsts] if coin == "pair" else coins
        params = cond(
            (choice == number) & jnp.any(active),
            lambda x, partners=partners, active=active: _average(x, axis_name, partners, active),
            lambda x: x,
            params,
        )
    return params


def _average(params, axis_name: str, partners: tuple[int, ...], active: jax.Array):
    own, unflatten = flatten(params)
    both = 0.5 * (own + permute(own, axis_name, partners))
    mine = active[index(axis_name)] if active.ndim else active
    return unflatten(jnp.where(mine, both, own))
