"""Several configs on the same data, seeds and budget: one table, one figure, one report.

    python -m experiments.compare --configs=configs/digits_dense.py,configs/digits_ef21.py \
        [--seeds=5] [--set=steps=500] [--workdir=runs/compare]

Every run is an ordinary `experiments.train` run in WORKDIR/<config>/<seed>: what is finished is
kept, what was interrupted goes on. Writes report.md, table.csv, figure.png and figure.svg.
"""

import ast
import csv
import importlib.util
import json
import logging as std_logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.config import Config
from experiments.train import setup_devices, train_and_evaluate
from jaxcomm.training.metrics import human_bytes, prepare_workdir

BUDGET = ("task", "workers", "steps", "batch_size")  # must be the same for all


class Runs(NamedTuple):
    """One config's runs, a seed each."""

    name: str
    summaries: list[dict[str, Any]]
    curves: list[list[dict[str, Any]]]  # the lines of metrics.jsonl with a validation loss

    def values(self, key: str) -> np.ndarray:
        """A figure of the summaries, one a seed; nan where there is none."""
        return np.array([float(s.get(key, "nan")) for s in self.summaries])


def load_config(text: str) -> tuple[str, Config]:
    """The name and config of `path.py` or `path.py:argument`.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path, _, argument = text.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(path).stem, module.get_config(argument or None)


def set_fields(config: Config, assignments: list[str]) -> None:
    """Applies 'a.b=value' assignments; values are Python literals, or strings."""
    changes = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or key.split(".")[0] not in config:
            raise ValueError(f"--set wants KEY=VALUE with a key of the config, got {assignment!r}")
        try:
            changes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[key] = text
    config.update_from_flattened_dict(changes)


def check_budget(configs: dict[str, Config]) -> None:
    """Raises a ValueError if two configs do not spend the same."""
    (first, reference), *others = configs.items()
    for name, config in others:
        for field in BUDGET:
            if str(config[field]) != str(reference[field]):
                raise ValueError(
                    f"{name} and {first} differ in config.{field}: a comparison needs the same "
                    f"{', '.join(BUDGET)} (see --set)"
                )


def compare(configs: dict[str, Config], seeds: int, workdir: str, command: str = "") -> list[Runs]:
    """Runs what is not finished, and writes the report."""
    check_budget(configs)
    path = prepare_workdir(workdir)
    everything = []
    for name, config in configs.items():
        runs = Runs(name, [], [])
        for seed in range(seeds):
            config.seed = seed
            folder = path / name / str(seed)
            runs.summaries.append(train_and_evaluate(config, str(folder)))
            lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            runs.curves.append([line for line in lines if "validation_loss" in line])
        everything.append(runs)
    rows = table_rows(everything)
    _print(rows)
    draw(everything, path)
    write_report(rows, path, command)
    return everything


def table_rows(everything: list[Runs]) -> list[dict[str, str]]:
    """The table as text: means over the seeds, spread as largest minus smallest."""
    rows = []
    for runs in everything:
        loss, sent = runs.values("validation_loss"), runs.values("sent_bytes").mean()
        row = {"method": runs.name, "loss": f"{loss.mean():.4f}", "spread": f"{np.ptp(loss):.4f}"}
        accuracy = runs.values("validation_accuracy")
        if np.isfinite(accuracy).all():
            row["accuracy"] = f"{accuracy.mean():.4f}"
        row |= {
            "steps": str(runs.summaries[0]["steps"]),
            "sent": human_bytes(sent),
            "fewer bytes": f"{runs.values('dense_bytes').mean() / max(sent, 1):.1f} x",
            "meetings": f"{runs.values('sync_step').mean():.0f}",
            "largest step": human_bytes(runs.values("largest_step_bytes").mean()),
            "seconds": f"{np.median(runs.values('seconds')):.1f}",
        }
        rows.append(row)
    return rows


def _print(rows: list[dict[str, str]]) -> None:
    table = Table()
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    wide = None if Console().is_terminal else 160  # a pipe is not 80 columns wide
    Console(width=wide).print(table)


def write_report(rows: list[dict[str, str]], path: Path, command: str) -> None:
    """table.csv, and report.md with the table and the figure."""
    with (path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["# Comparison", "", f"    {command}", ""] if command else ["# Comparison", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    lines += ["", "Loss: validation, mean over the seeds; spread: largest minus smallest.", ""]
    lines += ["![validation loss against steps, bytes and seconds](figure.png)", ""]
    (path / "report.md").write_text("\n".join(lines))


def draw(everything: list[Runs], path: Path) -> None:
    """Validation loss against steps, bytes and seconds; every curve is named at its end."""
    import matplotlib  # slow to import, an extra

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    panels = (("step", "steps", "linear"), ("sent_bytes", "bytes sent by a worker", "log"))
    panels += (("seconds", "seconds", "linear"),)
    for axis, (key, label, scale) in zip(axes, panels):
        ends = []
        for runs in everything:
            x = np.mean([[float(p[key]) for p in curve] for curve in runs.curves], axis=0)
            y = np.array([[float(p["validation_loss"]) for p in curve] for curve in runs.curves])
            keep = x > 0 if scale == "log" else slice(None)
            (line,) = axis.plot(x[keep], y.mean(0)[keep], marker=".")
            axis.fill_between(x[keep], *np.stack([y.min(0), y.max(0)])[:, keep], alpha=0.15)
            ends.append((runs.name, x[-1], y.mean(0)[-1], line.get_color()))
        axis.set(xlabel=label, xscale=scale, yscale="log")
        if axis is axes[-1]:
            _name_ends(axis, ends)
    axes[0].set_ylabel("validation loss")
    for kind in ("png", "svg"):
        figure.savefig(path / f"figure.{kind}", dpi=110)
    plt.close(figure)


def _name_ends(axis, ends) -> None:
    """Names beside the right edge, in the order of the final losses, in the curves' colours."""
    low, high = 0.02, 0.98
    ranked = sorted(ends, key=lambda end: end[2])
    for i, (name, _, value, colour) in enumerate(ranked):
        y = low + (high - low) * i / max(len(ranked) - 1, 1)
        text = f"{name}  {value:.3g}"
        axis.annotate(
            text, (1.02, y), xycoords="axes fraction", color=colour, va="center", fontsize=9
        )


def main(_: list[str]) -> None:
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    configs = dict(map(load_config, FLAGS.configs))
    for config in configs.values():
        set_fields(config, FLAGS.set)
    setup_devices(next(iter(configs.values())))
    cache = prepare_workdir(FLAGS.workdir) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    names = ",".join(FLAGS.configs)
    command = f"python -m experiments.compare --configs={names} --seeds={FLAGS.seeds}"
    command += "".join(f" --set={item}" for item in FLAGS.set)
    compare(configs, FLAGS.seeds, FLAGS.workdir, command)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_list("configs", None, "Config files, comma-separated; FILE:argument allowed.")
    flags.DEFINE_integer("seeds", 3, "Runs of each config.", lower_bound=1)
    flags.DEFINE_multi_string("set", [], "KEY=VALUE for every config.")
    flags.DEFINE_string("workdir", "runs/compare", "Where results go.")
    flags.mark_flag_as_required("configs")
    app.run(main)
