"""The comparison of configs: names, budget, table and files, on runs that are made up."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import compare
from experiments.command_line import sentence

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1)
# validation loss at the end (seed 0), bytes a step in the first and the second half
METHODS = {
    "digits_dense": (1.0, 400, 402),  # with a few metrics
    "digits_ef21": (1.02, 40, 40),
    "digits_one_bit_adam": (0.99, 400, 10),
}


def fake_run(config, workdir, every=25):
    """What `train_and_evaluate` leaves: 100 steps, a line at every 25th."""
    path = Path(workdir)
    loss, before, after = METHODS[path.parent.name]
    path.mkdir(parents=True, exist_ok=True)
    steps = [25, 50, 75, 100]
    sent = [25 * before, 50 * before, 50 * before + 25 * after, 50 * (before + after)]
    rows = [
        {"step": s, "sent_bytes": b, "seconds": s / 10}
        | ({} if every == 0 or s % every else {"validation_loss": loss + 100 / s - 1})
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


def readme_command():
    """The words of the README's `compare`."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^python -m experiments\.compare (?:.*\\\n)*.*", text, re.MULTILINE)
    return shlex.split(command.replace("\\\n", ""))


def option(words, name):
    (value,) = (word.partition("=")[2] for word in words if word.startswith(f"--{name}="))
    return value


def run_fakes(monkeypatch, configs, path, every):
    """A comparison of two seeds; `every` gives the steps between a seed's evaluations."""
    run = lambda config, workdir: fake_run(config, workdir, every(config))
    monkeypatch.setattr(compare, "train_and_evaluate", run)
    return compare.compare(configs, 2, str(path), "the command")


def test_readme_command_on_runs_without_evaluations(monkeypatch, tmp_path):
    """The configs' smoke sizes evaluate at the end only, for the summary."""
    words = readme_command()
    configs = compare.load_configs(option(words, "configs").split(","))
    for config in configs.values():
        compare.set_fields(config, [option(words, "set")])
        assert (config.mode, config.evaluate_every) == ("simulate", 0)
    monkeypatch.setitem(METHODS, "digits_diloco", (1.05, 40, 40))
    everything = run_fakes(monkeypatch, configs, tmp_path, lambda c: c.evaluate_every)
    for runs in everything:
        loss = METHODS[runs.name][0]
        ends = [(p["step"], p["validation_loss"]) for curve in runs.curves for p in curve]
        assert ends == [(100, loss), (100, loss + 0.01)]
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_readme_command(tmp_path):
    words = readme_command()
    words[words.index("--seeds=5")] = "--seeds=1"
    words[0] = sys.executable
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*words, f"--workdir={tmp_path}"], cwd=ROOT, env=environment, check=True)
    for name in ("report.md", "table.csv", "figure.png", "figure.svg"):
        assert (tmp_path / name).stat().st_size > 100


def test_seeds_evaluated_at_other_steps(monkeypatch, tmp_path):
    """`evaluate_every` may change between two calls: a curve has the steps of all its seeds."""
    configs = compare.load_configs(["configs/digits_dense.py"])
    (runs,) = run_fakes(monkeypatch, configs, tmp_path, lambda c: (25, 50)[c.seed])
    steps = [[point["step"] for point in curve] for curve in runs.curves]
    assert steps == [[25, 50, 75, 100], [50, 100]]
    common = [[point["step"] for point in curve] for curve in compare._common(runs.curves)]
    assert common == [[50, 100], [50, 100]]
    assert (tmp_path / "figure.png").exists()


def test_without_matplotlib_there_is_all_but_the_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    configs = compare.load_configs(["configs/digits_dense.py"])
    run_fakes(monkeypatch, configs, tmp_path, lambda c: 25)
    assert "matplotlib is not installed: no figure" in capsys.readouterr().out
    assert {p.name for p in tmp_path.glob("*.*")} == {"report.md", "table.csv"}


@pytest.mark.parametrize("order", [("dense", "co2"), ("co2", "dense")])
def test_there_are_devices_for_every_config(order, monkeypatch, tmp_path):
    """Transfers in the background of a sync rule need a second one each, wherever it stands."""
    settings = {}
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setattr(compare.job, "export", lambda: None)
    for name in ("initialize", "compare"):
        monkeypatch.setattr(compare, name, lambda *_: None)
    files = [f"configs/digits_{name}.py" for name in order]
    values = SimpleNamespace(configs=files, set=["background=True"], seeds=1, workdir=tmp_path)
    monkeypatch.setattr(compare, "FLAGS", values)
    compare.main([])
    assert settings["jax_num_cpu_devices"] == 16


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
    wrong = ("stepz=7", "learning_rate.warmup_step=7", "steps.x=7", "task.modle.kind=mlp", "steps")
    for text in wrong:
        with pytest.raises(ValueError, match=f"with a key of the config, got '{text}'"):
            compare.set_fields(config, [text])
    with pytest.raises(ValueError, match=r"--set=steps=abc: .*'steps'"):
        compare.set_fields(config, ["steps=abc"])


@pytest.mark.parametrize(
    ("file", "error", "match"),
    [
        ("configs/common.py", AttributeError, "common.py is no config: it has no function"),
        ("README.md", SyntaxError, r"README.md, line \d+, is no Python: "),
        ("configs/none.py", FileNotFoundError, "there is no config file configs/none.py"),
    ],
)
def test_what_is_no_config_is_a_sentence(file, error, match):
    with pytest.raises(error) as found:
        compare.load_config(file)
    assert re.search(match, sentence(found.value))


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
