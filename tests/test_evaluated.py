"""What is evaluated: averages of meetings, a server's parameters, or the mean over the workers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AXIS, batch, host, kinds, loss_fn, mesh, tree

import jaxcomm
from configs import digits_lawa
from experiments.tasks import make_task
from experiments.train import make_step, train_and_evaluate
from jaxcomm.sync import flasc, weight_average
from jaxcomm.training.checkpoint import Checkpointer

WAYS = {
    "simulate": lambda: {"simulate": 4},
    "devices": lambda: {"mesh": mesh(4)},
    "pmap": lambda: {"pmap": 4},
}
EVERY, STEPS = 2, 9


def make(rule, way="simulate", **options):
    how = WAYS[way]()
    return jaxcomm.make_train_step(
        loss_fn, optax.adam(0.02), axis_name=AXIS, sync=rule, **how, **options
    )


def trained(step, params=None, steps=STEPS):
    """The states after each step, on the host, and what is evaluated there."""
    state = step.init(tree() if params is None else params, jax.random.key(0))
    states, evaluated = [], []
    for i in range(steps):
        state, _ = step(state, batch(i))
        states.append(host(state))
        evaluated.append(host(step.consensus(state)))
    return states, evaluated


def mean(params):
    """Over the workers, in NumPy."""
    return jax.tree.map(lambda x: x.astype(np.float32).mean(0).astype(x.dtype), params)


def close(a, b, rtol=1e-5):
    assert kinds(a) == kinds(b)
    as_float = lambda x: np.asarray(x, np.float32)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(as_float(x), as_float(y), rtol, 1e-6), a, b
    )


@pytest.mark.parametrize(
    ("way", "last", "start"),
    [
        ("simulate", 3, 0),
        ("simulate", None, 5),
        ("devices", None, 0),
        ("devices", 3, 0),
        ("pmap", 2, 4),
    ],
)
def test_the_average_of_the_meetings(way, last, start):
    rule = weight_average(jaxcomm.diloco(AXIS, EVERY), last=last, start=start)
    states, evaluated = trained(make(rule, way))
    met = []
    for i, (state, found) in enumerate(zip(states, evaluated)):
        if (i + 1) % EVERY == 0 and i + 1 > start:
            met.append(state.sync_state.rule.anchor)
        if not met:
            close(found, mean(state.params))
            continue
        taken = met if last is None else met[-last:]
        close(found, jax.tree.map(lambda *xs: np.mean(xs, 0), *taken))
    assert len(met) > 1
    assert np.abs(evaluated[-1]["w"] - states[-1].sync_state.rule.anchor["w"]).max() > 1e-3


def test_it_has_the_dtype_of_the_parameters():
    rule = weight_average(jaxcomm.local_sgd(AXIS, EVERY), last=2)
    params = tree(jnp.bfloat16)
    states, evaluated = trained(make(rule), params, 4)
    anchors = [states[i].sync_state.rule.anchor for i in (1, 3)]
    for found, want in (
        (evaluated[0], mean(states[0].params)),
        (
            evaluated[3],
            jax.tree.map(
                lambda x, y, p: ((x + y) / 2).astype(p.dtype), *anchors, tree(jnp.bfloat16)
            ),
        ),
    ):
        assert kinds(found) == kinds(params)
        close(found, want, rtol=1e-2)


@pytest.mark.parametrize(
    ("way", "download"),
    [
        ("simulate", None),
        pytest.param("devices", jaxcomm.top_k(0.5), marks=pytest.mark.slow),
        ("pmap", jaxcomm.top_k(0.5)),
    ],
    ids=["simulate", "devices, sparse downloads", "pmap, sparse downloads"],
)
def test_the_server_of_flasc(way, download):
    rule = flasc(jaxcomm.top_k(0.25), AXIS, EVERY, download=download)
    states, evaluated = trained(make(rule, way), steps=5)
    close(evaluated[0], mean(states[0].params))  # nothing is known of the server before a meeting
    for state, found in list(zip(states, evaluated))[1:]:
        jax.tree.map(np.testing.assert_array_equal, found, state.sync_state.anchor)
    assert np.abs(found["w"] - mean(state.params)["w"]).max() > 1e-3


def test_a_rule_in_a_rule():
    """Before the average begins, what the inner rule evaluates."""
    rule = weight_average(flasc(jaxcomm.top_k(0.25), AXIS, EVERY), start=4)
    states, evaluated = trained(make(rule), steps=6)
    close(evaluated[0], mean(states[0].params))
    for i in (1, 2, 3, 4):
        close(evaluated[i], states[i].sync_state.rule.anchor)
    close(evaluated[5], states[5].sync_state.rule.anchor)  # the only one so far
    assert int(states[5].sync_state.count) == 1


@pytest.mark.parametrize("way", [pytest.param("simulate", marks=pytest.mark.slow), "devices"])
def test_what_travels_in_the_background(way):
    """A rule that evaluates what other devices hold, and one that does not."""
    plain = jaxcomm.streaming(jaxcomm.average(AXIS), 4, 1, delay=2)
    anchored = plain._replace(evaluated=lambda params, state: state.anchor)
    for rule in (plain, anchored):
        results = [trained(make(rule, way, background=b), steps=5) for b in (False, True)]
        for expected, found in zip(*(evaluated for _, evaluated in results)):
            close(found, expected)
        states, evaluated = results[1]
        last = states[-1]
        close(evaluated[-1], last.sync_state.anchor if rule is anchored else mean(last.params))


def test_means_of_what_differs_between_workers_in_a_state():
    rule = jaxcomm.eager_diloco(AXIS, EVERY)
    rule = rule._replace(evaluated=lambda params, state: state.anchor)
    states, evaluated = trained(make(rule), steps=5)
    anchor = states[-1].sync_state.anchor
    assert anchor["w"].shape == (4, 5, 3)
    close(evaluated[-1], mean(anchor))


@pytest.mark.slow
def test_the_summary_of_a_run_is_of_the_average(tmp_path):
    config = digits_lawa.get_config("smoke")
    config.mode = "simulate"
    config.task.model.kind = "mlp"
    summary = train_and_evaluate(config, str(tmp_path))
    task = make_task(config)
    step = make_step(config, task.loss_fn)
    like = step.init(task.init(jax.random.key(1)), jax.random.key(2))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        state, *_ = checkpointer.restore(like)
    weights, count = state.sync_state.weights, int(state.sync_state.count)
    assert count == config.steps // 8 + 1  # the last meeting is the end
    average = jax.tree.map(lambda w: np.asarray(w).sum(0) / min(count, 5), weights)
    own = jax.tree.map(lambda x: x.mean(0), state.params)
    got, of_average, of_own = (
        x["validation_loss"] for x in (summary, task.evaluate(average), task.evaluate(own))
    )
    assert got == pytest.approx(of_average, rel=1e-5)
    assert got != pytest.approx(of_own, rel=1e-3)
