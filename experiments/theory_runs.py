"""Runs one method on a problem: all rounds, workers and seeds in one compiled scan.

A method is an expression (see `experiments.expressions`) for an Optax chain or for
`just_one_byte`. In scope: axis_name, n, d, L (smoothness of f), L_i (of the f_i), loss and seed
(for just_one_byte), and the papers' yardsticks: less_gradients_at_optimum (the gradients that
EC-Ideal compresses) and forward_gradient(samples=) (what Just One Byte sends, unrounded).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomm
from experiments.expressions import evaluate
from experiments.problems import Problem
from jaxcomm.collectives import index
from jaxcomm.traffic import count
from jaxcomm.traffic.ledger import METRICS
from jaxcomm.transforms import EControlState, EF21State, JustOneByte

AXIS = "workers"


class Curve(NamedTuple):
    """One method's error, the seeds along axis 0."""

    label: str
    rounds: np.ndarray  # shape=(points,)
    errors: np.ndarray  # shape=(seeds, points)
    bits: np.ndarray  # shape=(points,): that one worker has put into messages, mean of the seeds

    @property
    def round_bits(self) -> float:
        """Bits a round, on average."""
        return float((self.bits[-1] - self.bits[0]) / self.rounds[-1])

    def rounds_to(self, factor: float) -> int | None:
        """First recorded round at which the seeds' mean error is down by the factor."""
        mean = self.errors.mean(0)
        hit = np.flatnonzero(mean <= mean[0] / factor)
        return int(self.rounds[hit[0]]) if hit.size else None


class Algorithm(NamedTuple):
    """A method on a problem, as pure functions."""

    init: Callable  # seed -> state
    step: Callable  # state, batch -> state, bits of this round
    point: Callable  # state -> x
    first_bits: float = 0.0  # sent before the first round


def run_method(problem: Problem, label: str, text: str, error: Callable, config) -> Curve:
    """The error of one method along `config.rounds` rounds, for seeds 0 to `config.seeds` - 1."""
    scope = functools.partial(_evaluate, problem, text, f"config.methods[{label!r}]")
    make = _one_byte if isinstance(scope(0), JustOneByte) else _optimizer
    make = _estimated if "page(" in text else make
    algorithm = make(problem, scope, config.dense_start)
    every = config.record_every
    points = max(config.rounds // every, 1)
    noise = None if problem.noise is None else problem.noise(points * every)
    noise = None if noise is None else noise.reshape(points, every, *noise.shape[1:])

    def trajectory(seed):
        def one_round(carry, z):
            state, bits = carry
            state, sent = algorithm.step(state, problem.batch(z))
            return (state, bits + sent), None

        def record(carry, z):
            carry, _ = jax.lax.scan(one_round, carry, z, length=every)
            return carry, (error(algorithm.point(carry[0])), carry[1])

        start = algorithm.init(seed), jnp.float32(algorithm.first_bits)
        first = error(jnp.asarray(problem.start)), start[1]
        _, rest = jax.lax.scan(record, start, noise, length=points)
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    errors, bits = jax.jit(jax.vmap(trajectory))(jnp.arange(config.seeds))
    rounds = np.arange(points + 1) * every
    return Curve(label, rounds, np.asarray(errors), np.asarray(bits).mean(0))


def _evaluate(problem: Problem, text: str, field: str, seed) -> Any:
    return evaluate(
        text,
        field,
        axis_name=AXIS,
        n=problem.workers,
        d=problem.start.size,
        L=problem.smoothness,
        L_i=problem.worker_smoothness,
        loss=problem.loss,
        seed=seed,
        less_gradients_at_optimum=_less_gradients_at_optimum(problem),
        forward_gradient=forward_gradient,
    )


def _optimizer(problem: Problem, make: Callable, dense_start: bool) -> Algorithm:
    """An Optax chain under `make_train_step`."""
    own = lambda x, rows, key: problem.loss(x, jax.tree.map(lambda a: a[0], rows), key)
    step = jaxcomm.make_train_step(
        own, make(0), axis_name=AXIS, simulate=problem.workers, donate=False
    )
    start = jnp.asarray(problem.start)
    state = step.init(start, jax.random.key(0))
    if dense_start:
        state = state._replace(opt_state=_know_gradients(state.opt_state, problem))
    noise = None if problem.noise is None else jnp.asarray(problem.noise(1)[0])
    report = jaxcomm.traffic(step, state, problem.batch(noise))
    sent = [c for c in report.collectives if c.part != METRICS]

    def bits(branches):
        taken = dict(zip(report.choices, branches))
        runs = lambda c: jnp.prod(jnp.array([taken[name] == b for name, b in c.when] or [True]))
        return sum((8.0 * c.operand_bytes * runs(c) for c in sent), jnp.zeros(()))

    def one_round(state, batch):
        state, metrics = step(state, batch)
        return state, bits(metrics["branches"])

    init = lambda seed: state._replace(key=jax.random.key(seed))
    return Algorithm(init, one_round, step.consensus, 32.0 * start.size * dense_start)


def _one_byte(problem: Problem, make: Callable, dense_start: bool) -> Algorithm:
    """`just_one_byte`; a state carries its seed along."""
    del dense_start

    def one_round(state, batch):
        seed, inner = state
        job = make(seed)
        inner, log = jax.vmap(job.step, (None, 0), (None, 0), axis_name=AXIS)(inner, batch)
        return (seed, inner), 8.0 * log.codes[0].size / problem.workers

    init = lambda seed: (seed, make(seed).init(jnp.asarray(problem.start)))
    return Algorithm(init, one_round, lambda state: state[1].params)


def _estimated(problem: Problem, make: Callable, dense_start: bool) -> Algorithm:
    """A chain that begins with `page`: its update takes gradients as functions."""
    del dense_start
    tx, start = optax.with_extra_args_support(make(0)), jnp.asarray(problem.start)
    numbers = jnp.arange(problem.workers)

    def worker(x, state, row, key, number):
        key = jax.random.fold_in(key, number)
        small = lambda y: jax.grad(problem.loss)(y, row, key)
        full = lambda y: jax.grad(problem.local)(y, row)
        g = small(x)
        updates, state = tx.update(g, state, x, gradient_fn=small, full_gradient_fn=full)
        return optax.apply_updates(x, updates), state

    def one_round(state, batch):
        key, x, opt_state = state
        key, use = jax.random.split(key)
        each = jax.vmap(worker, (0, 0, 0, None, 0), axis_name=AXIS)
        return (key, *each(x, opt_state, batch, use, numbers)), sent

    def init(seed):
        each = jax.vmap(lambda _: (start, tx.init(start)), axis_name=AXIS)(numbers)
        return jax.random.key(seed), *each

    update = lambda g: tx.update(
        g, tx.init(g), g, gradient_fn=lambda y: y, full_gradient_fn=lambda y: y
    )[0]
    sent = 8.0 * sum(c.operand_bytes for c in count(update, start, axis_sizes={AXIS: len(numbers)}))
    return Algorithm(init, one_round, lambda state: state[1][0])


def _know_gradients(opt_state, problem: Problem):
    """EF21's and EControl's estimates start at the exact gradients: one round sent dense."""
    gradients = jnp.asarray(problem.gradients(problem.start), jnp.float32)
    knows = lambda node: isinstance(node, EF21State | EControlState)
    know = lambda node: node._replace(local=gradients, mean=gradients.mean(0))
    return jax.tree.map(lambda node: know(node) if knows(node) else node, opt_state, is_leaf=knows)


def _less_gradients_at_optimum(problem: Problem) -> optax.GradientTransformation | None:
    """g_i - grad f_i(x*), whose mean over the workers is g: what EC-Ideal compresses."""
    if problem.solution is None:
        return None
    shifts = jnp.asarray(problem.gradients(problem.solution), jnp.float32)
    return optax.stateless_with_tree_map(lambda g, params: g - shifts[index(AXIS)])


class _Count(NamedTuple):
    count: jax.Array  # shape=(), dtype=jnp.int32


def forward_gradient(samples: int) -> optax.GradientTransformation:
    """MeZO with exact scalars: the mean over samples of z (z . g), z ~ N(0, I) of each worker."""

    def update_fn(g, state, params=None):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.count), index(AXIS))
        z = jax.random.normal(key, (samples, *g.shape))
        scalars = jnp.einsum("s...,...->s", z, g)
        return jnp.einsum("s,s...->...", scalars, z) / samples, _Count(state.count + 1)

    return optax.GradientTransformation(lambda params: _Count(jnp.zeros((), jnp.int32)), update_fn)
