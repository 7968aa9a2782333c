"""The comparison of configs: names, budget, table and files, on runs that are made up."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import compare

SEEDS = (0, 1)
# validation loss at the end (seed 0), bytes a step in the first and the second half
METHODS = {
    "digits_dense": (1.0, 400, 402),  # with a few metrics
    "digits_ef21": (1.02, 40, 40),
    "digits_one_bit_adam": (0.99, 400, 10),
}


def fake_run(config, workdir):
    """What `train_and_evaluate` leaves: 100 steps, evaluated at every 25th."""
    path = Path(workdir)
    loss, before, after = METHODS[path.parent.name]
    path.mkdir(parents=True, exist_ok=True)
    steps = [25, 50, 75, 100]
    sent = [25 * before, 50 * before, 50 * before + 25 * after, 50 * (before + after)]
    rows = [
        {"step": s, "sent_bytes": b, "seconds": s / 10, "validation_loss": loss + 100 / s - 1}
        for s, b in zip(steps, sent)
    ]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {
        "steps": 100,
        "validation_loss": loss + 0.01 * config.seed,
        "sent_bytes": sent[-1],
        "dense_bytes": 40_000,
        "dense_over_sent": 40_000 / sent[-1],
        "largest_step_bytes": before,
        "sync_step": 100,
        "seconds": 10.0,
    }


@pytest.fixture
def done(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        compare,
        "train_and_evaluate",
        lambda config, workdir: (calls.append(Path(workdir)), fake_run(config, workdir))[1],
    )
    configs = compare.load_configs([f"configs/{name}.py" for name in METHODS])
    everything = compare.compare(configs, len(SEEDS), str(tmp_path), "the command")
    return calls, everything, tmp_path


def test_all_configs_run_with_one_seed_before_the_next(done):
    calls, _, path = done
    assert calls == [path / name / str(seed) for seed in SEEDS for name in METHODS]


def test_table(done):
    _, everything, path = done
    lines = (path / "table.csv").read_text().splitlines()
    rows = {row["method"]: row for row in csv.DictReader(lines)}
    assert list(rows) == list(METHODS)
    assert [r["loss"] for r in rows.values()] == ["1.0050", "1.0250", "0.9950"]
    assert {r["spread"] for r in rows.values()} == {"0.0100"}
    assert [r["to dense"] for r in rows.values()] == ["+0.0 %", "+2.0 %", "-1.0 %"]
    assert [r["fewer bytes"] for r in rows.values()] == ["1.0 x", "10.0 x", "2.0 x"]
    assert [r["2nd half"] for r in rows.values()] == ["1.0 x", "10.0 x", "40.0 x"]
    assert [r["largest step"] for r in rows.values()] == ["400 B", "40 B", "400 B"]
    assert np.allclose([runs.curves[1][-1]["step"] for runs in everything], 100)


def test_files(done):
    _, _, path = done
    report = (path / "report.md").read_text()
    assert "    the command\n" in report
    for name in METHODS:
        assert f"| {name} | " in report
    assert "`optax.chain(average(axis_name), optax.adamw(learning_rate))`" in report
    assert (path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    figure = (path / "figure.svg").read_text()
    for name in METHODS:
        assert name.removeprefix("digits_") in figure


def test_without_a_dense_run_there_is_nothing_to_compare_with(tmp_path):
    runs = compare.Runs("digits_ef21", [], [])
    config = compare.load_config("configs/digits_ef21.py")[1]
    folder = tmp_path / "digits_ef21" / "0"
    runs.summaries.append(fake_run(config, str(folder)))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    runs.curves.append([json.loads(lines[-1])])  # and none but the last evaluation
    (row,) = compare.table_rows([runs])
    assert "to dense" not in row
    assert row["2nd half"] == "nan x"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("configs/digits_dense.py", "digits_dense"),
        ("configs/digits_dense.py:smoke", "digits_dense"),
        ("configs/qsr_digits_cosine.py:cubic", "qsr_digits_cosine_cubic"),
        ("configs/qsr_digits_cosine.py:post_local-smoke", "qsr_digits_cosine_post_local"),
    ],
)
def test_name(text, name):
    assert compare.load_config(text)[0] == name


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="digits_dense twice"):
        compare.load_configs(["configs/digits_dense.py", "configs/digits_dense.py:smoke"])


def test_different_budgets_are_refused():
    configs = compare.load_configs(["configs/digits_dense.py", "configs/digits_ef21.py"])
    compare.set_fields(configs["digits_ef21"], ["steps=7"])
    with pytest.raises(ValueError, match=r"digits_ef21 and digits_dense differ in config\.steps"):
        compare.check_budget(configs)


def test_set_refuses_what_is_no_field():
    config = compare.load_config("configs/digits_dense.py")[1]
    with pytest.raises(ValueError, match="got 'stepz=7'"):
        compare.set_fields(config, ["stepz=7"])
    with pytest.raises(ValueError, match=r"--set=steps=abc: .*'steps'"):
        compare.set_fields(config, ["steps=abc"])


RULES = ("dense", "constant", "linear", "quadratic", "cubic", "post_local")


@pytest.mark.parametrize("file", ["configs/qsr_digits_cosine.py", "configs/qsr_quadratic_lm.py"])
def test_qsr_rules(file):
    configs = compare.load_configs([f"{file}:{rule}-smoke" for rule in RULES])
    compare.check_budget(configs)
    assert len({config.tx + config.sync for config in configs.values()}) == len(RULES)
    default = compare.load_config(file + ":smoke")[1]
    assert default.sync == configs[file[8:-3] + "_quadratic"].sync != ""
    with pytest.raises(ValueError, match="picks one of dense, constant, linear"):
        compare.load_config(file + ":quartic")
