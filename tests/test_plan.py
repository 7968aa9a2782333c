"""experiments.plan: what a config costs, counted and timed without a second device."""

import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import jaxcomm
from configs import digits_dense, digits_ef21, digits_local_sgd, digits_qsr
from experiments import alone, plan
from experiments.tasks import make_task
from jaxcomm.traffic import Link

ROOT = Path(__file__).parent.parent


def smoke(module, **changes):
    config = module.get_config("smoke")
    config.task.model = {"kind": "mlp", "hidden": 16}
    config.update(changes)
    return config


def examples(config):
    task = make_task(config)
    return task, next(task.train_iterator(config.batch_size, 0))


def test_the_branches_of_a_config_are_those_of_its_schedule():
    config = smoke(digits_qsr, steps=200)
    task, _ = examples(config)
    shares = alone.branch_shares(config, task)
    rate = plan_learning_rate(config)
    schedule = jaxcomm.qsr(rate, 0.006, 4, config.learning_rate.warmup_steps)
    meetings = len(jaxcomm.sync_steps(schedule, 200))
    assert shares == {(1,): meetings / 200, (0,): 1 - meetings / 200}


def test_a_rule_that_wants_more_than_the_stand_in_has_is_counted_on_the_model():
    sync = "periodic(error_feedback(top_k(k=500), axis_name), 5, total_steps=steps)"
    config = smoke(digits_local_sgd, steps=10, sync=sync)
    task, _ = examples(config)
    assert alone.branch_shares(config, task) == {(1,): 0.2, (0,): 0.8}
    config.sync = sync.replace("500", "100_000")
    with pytest.raises(ValueError, match="k must be at most the vector's size, got k=100000"):
        alone.branch_shares(config, task)


def plan_learning_rate(config):
    from experiments.schedules import learning_rate

    return learning_rate(config)


@pytest.fixture(scope="module")
def ef21():
    return plan.make_plan("ef21", smoke(digits_ef21), [2, 4, 16, 4096])


def test_traffic_is_traced_for_every_number_of_workers(ef21):
    elements = ef21.traffic[2].elements
    for n, found in ef21.traffic.items():
        message = jaxcomm.top_k(0.01).payload_bytes(elements)
        metrics = found.by("kind")["metrics"]
        assert found.every_step_bytes == pytest.approx((n - 1) * message + metrics)
        assert ef21.dense[n].every_step_bytes == pytest.approx(
            found.dense_equivalent_bytes + metrics
        )


def test_times_are_positive_and_grow_with_the_messages(ef21):
    assert ef21.compute_seconds > 0
    seconds = [ef21.codec_seconds(n) for n in (2, 16, 4096)]
    assert 0 <= seconds[0] <= seconds[1] <= seconds[2]


def test_advice_and_tables(ef21):
    slow, fast = Link.parse("10mbit@50us"), Link.parse("400gbit@50us")
    advice = plan.advise({"ef21": ef21}, slow, 4)
    assert advice.best == "ef21"
    assert advice.predictions["dense"].codec_seconds == 0
    assert advice.predictions["ef21"].compute_seconds == ef21.compute_seconds
    console = Console(width=150, record=True)
    plan.show({"ef21": ef21}, [slow, fast], [2, 4096], console)
    text = console.export_text()
    assert "10mbit" in text
    assert "4096" in text
    entries = plan.as_json({"ef21": ef21}, [slow, fast], [2, 4])
    assert len(entries) == 2 * 2 * 2
    for entry in entries:
        parts = ("compute", "codec", "latency", "transfer")
        total = sum(entry[f"{part}_seconds"] for part in parts)
        assert entry["step_seconds"] == pytest.approx(total)
    json.dumps(entries)


def test_given_times_are_not_measured(monkeypatch):
    monkeypatch.setattr(plan, "time_alone", lambda *_: pytest.fail("measured"))
    found = plan.make_plan("qsr", smoke(digits_qsr), [2], compute_seconds=0.5, codec_seconds=0.25)
    assert (found.compute_seconds, found.codec_seconds(2)) == (0.5, 0.25)
    prediction = plan.advise({"qsr": found}, Link(1e9), 2).predictions["qsr"]
    assert prediction.step_seconds == pytest.approx(0.75 + prediction.communication_seconds)


def test_a_step_alone_is_the_step_of_a_worker():
    """Dense, one worker: what is timed is the training itself."""
    config = smoke(digits_dense, workers=1, mode="simulate")
    task, batch = examples(config)
    (seconds,) = alone.time_alone(config, task, batch, 1, steps=2).values()
    assert 0 < seconds < 5
    assert np.isfinite(seconds)


def test_unseen_branches_cost_what_the_dearest_seen_one_does():
    assert alone.mean_seconds({(0,): 1.0, (1,): 3.0}, {(0,): 0.5, (1,): 0.25, (2,): 0.25}) == 2.0


@pytest.mark.parametrize("text", ["abc", "2,0", "-1", "1.5", ""])
def test_numbers_of_workers_are_whole_and_positive(text):
    rule = f"^--workers must be whole numbers of at least 1, got {text}$"
    with pytest.raises(ValueError, match=rule):
        plan.worker_counts(text.split(","))
    assert plan.worker_counts(["2", "16"]) == [2, 16]


def test_a_plan_is_for_a_number_of_workers():
    with pytest.raises(ValueError, match=r"config\.workers must be at least 1 for plan.*, got 0$"):
        plan.make_plan("none", smoke(digits_dense, workers=0), [2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"links": []}, "--links must be at least one link, got none"),
        ({"configs": ["configs/digits_ef21.py:smoke"] * 2}, "has digits_ef21 twice"),
    ],
)
def test_flags_that_say_nothing_or_something_twice_are_refused(changes, message, monkeypatch):
    given = {"config": None, "configs": ["configs/digits_ef21.py"], "links": ["1mbit"]}
    wire = {"latency": "50us", "overhead": 1.0, "burst": 0.0}
    monkeypatch.setattr(plan, "FLAGS", types.SimpleNamespace(**given | wire | changes))
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        plan.main([])


def test_the_command_line_refuses_in_one_sentence():
    command = [sys.executable, "-m", "experiments.plan", "--configs=configs/nothing.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: there is no config file configs/nothing.py"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "experiments.plan", f"--workdir={tmp_path}"]
    command += ["--config=configs/digits_ef21.py:smoke", "--configs=configs/digits_qsr.py:smoke"]
    command += ["--links=10mbit,400gbit@2us", "--workers=2,4096"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for words in ("digits_ef21", "digits_qsr", "pays below", "steps by the branches they take"):
        assert words in done.stdout, words
    entries = json.loads((tmp_path / "plan.json").read_text())
    assert {e["method"] for e in entries} == {"dense", "digits_ef21", "digits_qsr"}
    assert jax.tree.all(jax.tree.map(lambda x: x == x, entries))  # no NaN
