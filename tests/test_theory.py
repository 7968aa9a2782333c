"""The theory binary: golden figures, every config in a few rounds, what it writes, bad input.

The slow test runs every config to its end and holds its docstring's expectations against it.
"""

import ast
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import theory
from experiments.problems import PROBLEMS

CONFIGS = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("theory_*.py"))


def load(name, argument=None):
    return importlib.import_module(f"configs.{name}").get_config(argument)


QUICK = ("theory_just_one_byte",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CONFIGS]
)
def test_config_runs(name, tmp_path):
    config = load(name, "smoke")
    config.record_every = 10
    config.seeds = min(config.seeds, 2)
    curves = theory.run(config, str(tmp_path))
    assert len(curves) == len(config.methods)
    for curve in curves:
        assert curve.errors.shape == (config.seeds, 3)
        assert np.isfinite(curve.errors).all()
        assert curve.round_bits > 0
        assert (np.diff(curve.bits) > 0).all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {label for label, _ in config.methods}
    for name in ("curves.csv", "figure.png", "figure.svg"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_whole(name):
    """The problem is built, its constants bound its curvature, the expressions parse."""
    config = load(name)
    arguments = {k: v for k, v in config.problem.items() if k != "name"}
    problem = PROBLEMS[config.problem.name](**arguments)
    constants = np.array(problem.worker_smoothness)
    assert problem.smoothness <= constants.mean() * (1 + 1e-6)
    for _, text in config.methods:
        ast.parse(text, mode="eval")
    assert config.rounds >= 100
    assert f"--config=configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__


def test_local_functions_are_as_smooth_as_they_say():
    """|grad f_i(x) - grad f_i(y)| <= L_i |x - y|."""
    for name, arguments in (
        ("quadratics", {}),
        ("logistic", {"n": 5, "d": 10}),
        ("regression", {"n": 5, "penalty": 0.1}),
    ):
        problem = PROBLEMS[name](**arguments)
        points = np.random.default_rng(0).normal(size=(2, 50, problem.start.size))
        gradients = jax.jit(jax.vmap(problem.gradients))(points.reshape(100, -1))  # (100, n, d)
        change = np.linalg.norm(gradients[:50] - gradients[50:], axis=-1)
        ratio = change / np.linalg.norm(points[0] - points[1], axis=-1)[:, None]
        assert (ratio <= np.array(problem.worker_smoothness) * (1 + 1e-4)).all(), name


def test_bits_follow_the_branches(tmp_path):
    """1-bit Adam: 32 bits a coordinate until the freeze; then d, a chunk of it, and two scales."""
    config = load("theory_one_bit_adam_noiseless", "smoke")
    config.rounds, config.methods = 120, config.methods[2:]
    (curve,) = theory.run(config, str(tmp_path))
    sent = np.diff(curve.bits) / config.record_every
    assert (sent[:20] == 32 * 200).all()
    assert (sent[20:] == 8 * (4 * 7 + 7) + 32 * 5).all()  # 50 signs are 7 bytes


def test_estimates_that_know_the_gradients_pay_for_them(tmp_path):
    """A dense start costs 32 d bits, and EF21's first step is gradient descent's."""
    config = load("theory_econtrol_noiseless", "smoke")
    config.record_every = 1
    config.methods = (
        config.methods[2],
        ("dense", config.methods[2][1].replace("top_k(k=5)", "identity()")),
    )
    ef21, dense = theory.run(config, str(tmp_path))
    assert ef21.bits[0] == 32 * 50
    np.testing.assert_allclose(ef21.errors[0, 1], dense.errors[0, 1], rtol=1e-5)
    assert ef21.errors[0, 2] != dense.errors[0, 2]


def test_a_divergence_without_matplotlib(monkeypatch, tmp_path, capsys):
    """All but the figure is written; JSON has no infinity."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    errors = np.array([[1.0, np.inf]])
    curve = theory.Curve("x", np.arange(2), errors, np.arange(2.0))
    monkeypatch.setattr(theory, "run_method", lambda *_: curve)
    config = load("theory_divergence", "smoke")
    config.methods = (("x", ""),)
    theory.run(config, str(tmp_path))
    assert "matplotlib is not installed: no figure" in capsys.readouterr().out
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["x"]["final"] == "inf"
    assert {path.name for path in tmp_path.iterdir()} == {"curves.csv", "summary.json"}


def ends(curves):
    return {curve.label: curve.errors[:, -1].mean() for curve in curves}


def expect_econtrol(curves):
    golden = {"EC": 0.038, "EC-Ideal": 0.028, "EF21": 0.103, "EControl": 0.042}
    for label, value in golden.items():
        assert ends(curves)[label] == pytest.approx(value, rel=0.02)


def expect_econtrol_noiseless(curves):
    end = ends(curves)
    assert end.pop("EC, step 0.02") == pytest.approx(0.079, rel=0.02)
    assert end.pop("EC, step 0.005") == pytest.approx(0.0215, rel=0.02)
    assert max(end.values()) < 1e-5


def expect_divergence(curves):
    end = ends(curves)
    assert end.pop("naive") > 1e10
    assert max(end.values()) < 1e-6


def expect_dgc(curves):
    level = {c.label: np.log(c.errors[:, 20:]).mean() for c in curves}  # from round 100 on
    assert level["dense momentum SGD"] < level["DGC"] < level["momentum after error feedback"]
    rounds = {c.label: c.rounds_to(4.0) for c in curves}
    assert rounds["DGC, warm-up of 50 rounds"] <= rounds["dense momentum SGD"] + 10
    assert 2 * rounds["dense momentum SGD"] < rounds["DGC"]


def expect_ef21_bc(curves):
    rounds = {c.label: c.rounds_to(100.0) for c in curves}
    assert max(ends(curves).values()) < 1e-10
    assert rounds["BC, Top-10 down"] <= 1.2 * rounds["EF21"]
    assert 1.5 * rounds["EF21"] < rounds["BC, Top-1 down"] < 4 * rounds["EF21"]


def expect_ef21_logistic(curves):
    end = ends(curves)
    assert end["EF21, L_AM"] < end["EF21, L_QM"] / 4
    assert end["EF21-W, L_AM"] == pytest.approx(end["EF21, L_AM"], rel=1e-3)


def expect_ef21_regression(curves):
    rounds = {c.label: c.rounds_to(1000.0) for c in curves}
    assert 3 < rounds["EF21, L_QM"] / rounds["EF21, L_AM"] < 5
    assert rounds["EF21, L_AM"] == rounds["EF21-W, L_AM"]


def expect_ef21_pp(curves):
    rounds = {c.label: c.rounds_to(100.0) for c in curves}
    assert rounds["EF21"] < rounds["PP, p = 1/8"] < 8 * rounds["EF21"]
    assert max(ends(curves).values()) < 1e-6


def expect_ef21_page(curves):
    stalled, page, full = (c.errors[0] for c in curves)
    assert stalled[-10:].mean() > 1e4 * page[-1]
    assert page[-1] < 1e-9
    assert full[-1] < 1e-9


def expect_ef21_sgdm(curves):
    end = ends(curves)
    assert end["EF21-SGD, step 0.001"] > 0.3 * end["EF21-SGD, step 0.01"]
    assert end["EF21-SGDM, step 0.01"] < 0.6 * end["EF21-SGD, step 0.01"]
    assert end["EF21-SGDM, step 0.001"] < 0.2 * end["EF21-SGDM, step 0.01"]


def expect_just_one_byte(curves):
    rounds = {c.label: c.rounds_to(10.0) for c in curves}
    assert rounds["one byte"] < 1.25 * rounds["float32 scalars"] < rounds["one byte, clipped at 5"]
    assert ends(curves)["one byte, clipped at 5"] < 0.3 * ends(curves)["one byte"]
    assert curves[1].round_bits == 64


def expect_one_bit_adam(curves):
    end = ends(curves)
    assert end["1-bit Adam"] < 1.15 * end["Adam"]
    assert end["1-bit gradients, Adam"] > 5 * end["1-bit Adam"]


def expect_one_bit_adam_noiseless(curves):
    adam, textbook, safe = (c.errors[0] for c in curves)
    assert 1.5 < textbook.max() / textbook[0] < 3.0
    assert safe[20:].max() <= safe[20]  # never above where it froze
    assert safe[-1] < 1e-3 * safe[20]
    assert adam[-1] < safe[-1]


def expect_power_sgd(curves):
    dense, two, one, top = (c.errors[0] for c in curves)
    np.testing.assert_allclose(two[:50], dense[:50], rtol=1e-2)
    assert one[-1] < 1e-5 < 0.1 < top[-1]
    assert curves[1].round_bits * 6 == curves[0].round_bits


def expect_rare_features(curves):
    rounds = {c.label: c.rounds_to(1e6) for c in curves}
    assert 2 < rounds["EF21, rare features"] / rounds["gradient descent"] < 5
    assert 10 < rounds["EF21, general step"] / rounds["EF21, rare features"] < 20


def expect_sign_sgd(curves):
    end = ends(curves)
    assert end["signSGD"] == pytest.approx(0.765, rel=1e-3)
    assert end["scaled sign with feedback"] < 0.01


def expect_ef21_reloaded(curves):
    assert [c.rounds_to(1e6) for c in curves] == pytest.approx([3656, 864, 864], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_shows_what_its_docstring_says(name, tmp_path):
    expect = globals()[name.replace("theory", "expect")]
    expect(theory.run(load(name), str(tmp_path)))


def test_naive_top_1_grows_by_the_known_factor(tmp_path):
    config = load("theory_divergence", "smoke")
    config.methods = (
        ("naive", "optax.chain(compressed_average(top_k(k=1), axis_name), optax.sgd(0.01))"),
    )
    config.record_every = 1
    (curve,) = theory.run(config, str(tmp_path))
    # starts at (1, 1, 1), where all three worker's Top-1 messages average to 11/6 x
    np.testing.assert_allclose(curve.errors[0, 1:] / curve.errors[0, :-1], 1 + 11 / 600, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "accuracy"}, "config.error must be one of"),
        ({"record_every": 0}, "config.record_every must be at least 1, got 0"),
        ({"seeds": 0}, "config.seeds must be at least 1, got 0"),
        ({"rounds": -1}, "config.rounds must be at least 1, got -1"),
        ({"problem": {"name": "cubic"}}, "config.problem.name must be one of"),
        ({"methods": (("x", "ef22(top_k(k=1))"),)}, "there is no 'ef22'"),
    ],
)
def test_bad_config(change, message, tmp_path):
    config = load("theory_divergence", "smoke")
    with config.unlocked():
        config.update(change)
    with pytest.raises(ValueError, match=message):
        theory.run(config, str(tmp_path))
