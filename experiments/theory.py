"""Runs methods on a paper's problem, in one compiled scan each, and draws error against bits.

    python -m experiments.theory --config=configs/theory_ef21_reloaded.py [--workdir=DIR]

All n workers (2 to 2,000) are simulated on one device; the seeds of a method share one program.
Writes WORKDIR/curves.csv, summary.json, figure.png and figure.svg.
"""

import csv
import json
import logging as std_logging
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

import jaxcomm
from experiments.config import Config
from experiments.expressions import evaluate as expression
from experiments.problems import PROBLEMS, Problem
from experiments.train import default_workdir
from jaxcomm.training.metrics import prepare_workdir

ERRORS = ("gradient", "distance", "loss")


class Curve(NamedTuple):
    """One method's error, the seeds along axis 0."""

    label: str
    rounds: np.ndarray  # shape=(points,)
    errors: np.ndarray  # shape=(seeds, points)
    round_bits: float  # that one worker puts into messages, a round

    def rounds_to(self, factor: float) -> int | None:
        """First recorded round at which the seeds' mean error is down by the factor."""
        mean = self.errors.mean(0)
        hit = np.flatnonzero(mean <= mean[0] / factor)
        return int(self.rounds[hit[0]]) if hit.size else None


def error_function(problem: Problem, kind: str):
    """Squared gradient norm, relative distance to the solution, or loss, of one x."""
    if kind not in ERRORS:
        raise ValueError(f"config.error must be one of {', '.join(ERRORS)}, got {kind!r}")
    if kind == "gradient":
        return lambda x: jnp.sum(jax.grad(problem.exact)(x) ** 2)
    if kind == "loss":
        return problem.exact
    if problem.solution is None:
        raise ValueError("config.error='distance' needs a problem with a known solution")
    solution = jnp.asarray(problem.solution, jnp.float32)
    scale = jnp.linalg.norm(solution)
    return lambda x: jnp.linalg.norm(x - solution) / jnp.where(scale > 0, scale, 1.0)


def run_method(problem: Problem, label: str, text: str, config) -> Curve:
    """Runs one method, given as an expression (see `experiments.expressions`), over the seeds."""
    n = len(problem.worker_smoothness)
    scope = {"axis_name": "workers", "L": problem.smoothness, "n": n, "d": problem.start.size}
    scope |= {"L_i": problem.worker_smoothness, "solution": problem.solution}
    tx = expression(text, f"config.methods[{label!r}]", **scope)
    one_row = lambda x, rows, key: problem.loss(x, jax.tree.map(lambda a: a[0], rows), key)
    step = jaxcomm.make_train_step(one_row, tx, axis_name="workers", simulate=n, donate=False)
    start = jnp.asarray(problem.start)
    state = step.init(start, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, problem.data)
    error = error_function(problem, config.error)
    points = max(config.rounds // config.record_every, 1)

    def trajectory(key):
        def record(state, _):
            state, _ = jax.lax.scan(
                lambda s, _: (step(s, batch)[0], None), state, length=config.record_every
            )
            return state, error(step.consensus(state))

        _, errors = jax.lax.scan(record, state._replace(key=key), length=points)
        return jnp.concatenate([error(start)[None], errors])

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    errors = np.asarray(jax.jit(jax.vmap(trajectory))(keys))
    report = jaxcomm.traffic(step, state, batch)
    bits = 8 * sum(c.operand_bytes for c in report.collectives if c.part != "metrics")
    return Curve(label, np.arange(points + 1) * config.record_every, errors, bits)


def run(config: Config, workdir: str) -> list[Curve]:
    """Runs every method of the config and writes the results."""
    if config.problem.name not in PROBLEMS:
        raise ValueError(
            f"config.problem.name must be one of {', '.join(PROBLEMS)}, got {config.problem.name!r}"
        )
    arguments = {k: v for k, v in config.problem.items() if k != "name"}
    problem = PROBLEMS[config.problem.name](**arguments)
    path = prepare_workdir(workdir)
    curves = [run_method(problem, label, text, config) for label, text in config.methods]
    _write(path, curves, config)
    draw(curves, config, path)
    return curves


def _write(path: Path, curves: list[Curve], config) -> None:
    with (path / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "seed", "round", "bits", config.error])
        for curve in curves:
            for seed, errors in enumerate(curve.errors):
                for t, value in zip(curve.rounds, errors):
                    bits = float(t * curve.round_bits)
                    rows.writerow([curve.label, seed, int(t), bits, float(value)])
    table = Table(title=config.title, title_justify="left")
    for name in ("method", f"final {config.error}", "spread", "bits a round", _goal(config)):
        table.add_column(name)
    summary = {}
    for curve in curves:
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
    (path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    Console().print(table)


def _goal(config) -> str:
    return f"rounds to 1/{config.factor:g}"


def draw(curves: list[Curve], config, path: Path) -> None:
    """Mean error over the seeds, and its quartiles, against rounds and against bits."""
    import matplotlib  # slow to import, an extra

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for curve in curves:
        mean = np.maximum(curve.errors.mean(0), 1e-38)
        for axis, x in ((axes[0], curve.rounds), (axes[1], curve.rounds * curve.round_bits)):
            (line,) = axis.plot(x, mean, label=curve.label)
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
    app.run(main)
