"""Runs methods on a paper's problem, in one compiled scan each, and draws error against bits.

    python -m experiments.theory --config=configs/theory_ef21_reloaded.py [--workdir=DIR]

All n workers (2 to 2,000) are simulated on one device; the seeds of a method share one program.
Writes WORKDIR/curves.csv, summary.json, figure.png and figure.svg.
"""

import csv
import json
import logging as std_logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.config import Config
from experiments.figures import pyplot
from experiments.problems import PROBLEMS, Problem
from experiments.theory_runs import Curve, run_method
from experiments.train import default_workdir
from jaxcomm.training.metrics import jsonable, prepare_workdir

ERRORS = ("gradient", "distance", "loss")


def error_function(problem: Problem, kind: str):
    """Squared gradient norm, distance to the solution (1 at the start), or loss, of one x."""
    if kind not in ERRORS:
        raise ValueError(f"config.error must be one of {', '.join(ERRORS)}, got {kind!r}")
    if kind == "gradient":
        return lambda x: jnp.sum(jax.grad(problem.exact)(x) ** 2)
    if kind == "loss":
        return problem.exact
    if problem.solution is None:
        raise ValueError("config.error='distance' needs a problem with a known solution")
    solution = jnp.asarray(problem.solution, jnp.float32)
    first = jnp.linalg.norm(problem.start - solution)
    return lambda x: jnp.linalg.norm(x - solution) / first


def run(config: Config, workdir: str) -> list[Curve]:
    """Runs every method of the config and writes the results.

    Raises:
      ValueError: an unknown problem or error, or a number of the config that is less than 1.
    """
    for field in ("rounds", "record_every", "seeds"):
        if config[field] < 1:
            raise ValueError(f"config.{field} must be at least 1, got {config[field]}")
    if config.problem.name not in PROBLEMS:
        raise ValueError(
            f"config.problem.name must be one of {', '.join(PROBLEMS)}, got {config.problem.name!r}"
        )
    arguments = {k: v for k, v in config.problem.items() if k != "name"}
    problem = PROBLEMS[config.problem.name](**arguments)
    path = prepare_workdir(workdir)
    error = error_function(problem, config.error)
    curves = [run_method(problem, label, text, error, config) for label, text in config.methods]
    _write(path, curves, config)
    draw(curves, config, path)
    return curves


def _write(path: Path, curves: list[Curve], config) -> None:
    with (path / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "seed", "round", "bits", config.error])
        for curve in curves:
            for seed, errors in enumerate(curve.errors):
                for t, bits, value in zip(curve.rounds, curve.bits, errors):
                    rows.writerow([curve.label, seed, int(t), float(bits), float(value)])
    table = Table(title=config.title, title_justify="left")
    for name in ("method", f"final {config.error}", "spread", "bits a round", _goal(config)):
        table.add_column(name)
    summary = {}
    for curve in curves:
        with np.errstate(invalid="ignore"):  # of a method that diverged to infinity
            last, spread = curve.errors[:, -1].mean(), curve.errors[:, -1].std()
        rounds = curve.rounds_to(config.factor)
        figures = (f"{last:.3g}", f"{spread:.1g}", f"{curve.round_bits:,.0f}", str(rounds or "-"))
        table.add_row(curve.label, *figures)
        summary[curve.label] = {
            "final": float(last),
            "spread": float(spread),
            "round_bits": curve.round_bits,
            "rounds_to_factor": rounds,
        }
    (path / "summary.json").write_text(json.dumps(jsonable(summary), indent=2) + "\n")
    Console().print(table)


def _goal(config) -> str:
    return f"rounds to 1/{config.factor:g}"


def draw(curves: list[Curve], config, path: Path) -> None:
    """Mean error over the seeds, and its quartiles, against rounds and against bits."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for i, curve in enumerate(curves):  # dashed and dotted, so that equal ones both show
        mean = np.maximum(curve.errors.mean(0), 1e-38)
        bits = np.where(curve.bits > 0, curve.bits, np.nan)
        for axis, x in ((axes[0], curve.rounds), (axes[1], bits)):
            (line,) = axis.plot(x, mean, ("-", "--", ":")[i % 3], label=curve.label)
            if len(curve.errors) > 1:
                low, high = np.quantile(curve.errors, (0.25, 0.75), axis=0)
                axis.fill_between(
                    x, np.maximum(low, 1e-38), high, color=line.get_color(), alpha=0.2
                )
    axes[0].set(xlabel="rounds", ylabel=_LABEL[config.error], yscale="log")
    axes[1].set(xlabel="bits sent by a worker", xscale="log", yscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(config.title, fontsize=11)
    for kind in ("png", "svg"):
        figure.savefig(path / f"figure.{kind}", dpi=110)
    plt.close(figure)


_LABEL = {
    "gradient": "squared gradient norm",
    "distance": "relative distance to the solution",
    "loss": "loss",
}


def main(_: list[str]) -> None:
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    name = config_flags.get_config_filename(FLAGS["config"])
    run(FLAGS.config, FLAGS.workdir or default_workdir(name))


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where results go; default runs/<config name>.")
    flags.mark_flag_as_required("config")
    command_line.run(main)
