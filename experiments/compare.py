"""Several configs on the same data, seeds and budget: one table, one figure, one report.

    python -m experiments.compare --configs=configs/digits_dense.py,configs/digits_ef21.py \
        [--seeds=5] [--set=steps=500] [--workdir=runs/compare]

Every run is an ordinary `experiments.train` run in WORKDIR/<config>/<seed>: what is finished is
kept, what was interrupted goes on. All configs run with the first seed, then with the second, so
that a comparison can be looked at early. Writes report.md, table.csv, figure.png and figure.svg.
"""

import ast
import csv
import importlib.machinery
import importlib.util
import json
import logging as std_logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import command_line, job
from experiments.config import Config
from experiments.devices import setup_devices
from experiments.figures import pyplot
from experiments.train import train_and_evaluate
from jaxcomm.training.distributed import initialize
from jaxcomm.training.metrics import human_bytes, prepare_workdir

BUDGET = ("task", "workers", "steps", "batch_size")  # must be the same for all


class Runs(NamedTuple):
    """One config's runs, a seed each."""

    name: str
    summaries: list[dict[str, Any]]
    curves: list[list[dict[str, Any]]]  # what was evaluated: lines of metrics.jsonl, and the end

    def values(self, key: str) -> np.ndarray:
        """A figure of the summaries, one a seed; nan where there is none."""
        return np.array([float(s.get(key, "nan")) for s in self.summaries])


def load_config(text: str) -> tuple[str, Config]:
    """The name and config of `path.py` or `path.py:argument`.

    An argument is part of the name (`qsr_digits_cosine:cubic` is qsr_digits_cosine_cubic), but for
    a size: 'smoke', or the '-smoke' at its end.

    Raises:
      FileNotFoundError: there is no such file.
      SyntaxError: it is no Python.
      AttributeError: it has no `get_config`.
    """
    path, _, argument = text.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    loader = importlib.machinery.SourceFileLoader(Path(path).stem, path)
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    rule = argument.removesuffix("smoke").removesuffix("-")
    return "_".join(filter(None, (Path(path).stem, rule))), module.get_config(argument or None)


def load_configs(texts: list[str]) -> dict[str, Config]:
    """Names and configs of several files.

    Raises:
      ValueError: two have one name, and would share a directory.
    """
    configs = {}
    for text in texts:
        name, config = load_config(text)
        if name in configs:
            raise ValueError(f"--configs has {name} twice ({text}): one would hide the other")
        configs[name] = config
    return configs


def set_fields(config: Config, assignments: list[str]) -> None:
    """Applies 'a.b=value' assignments; values are Python literals, or strings.

    Raises:
      ValueError: not a field of the config, or a value of another type.
    """
    config.lock()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        wrong = f"--set wants KEY=VALUE with a key of the config, got {assignment!r}"
        if not equals:
            raise ValueError(wrong)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.update_from_flattened_dict({key: value})
        except KeyError:
            raise ValueError(wrong) from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"--set={assignment}: {error}") from error


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
    everything = [Runs(name, [], []) for name in configs]
    for seed in range(seeds):
        for runs, config in zip(everything, configs.values()):
            config.seed = seed
            folder = path / runs.name / str(seed)
            runs.summaries.append(train_and_evaluate(config, str(folder)))
            if jax.process_index() != 0:  # the first one reads and writes
                continue
            lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            runs.curves.append(evaluated(lines, runs.summaries[-1]))
    if jax.process_index() != 0:
        return everything
    rows = table_rows(everything)
    _print(rows)
    write_report(rows, settings(configs), path, command)
    draw(everything, path)
    return everything


def evaluated(lines: Iterable[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics with a validation loss; the summary is the one of the last step."""
    end = summary["steps"]
    points = [line for line in lines if "validation_loss" in line and line["step"] < end]
    return [*points, {**summary, "step": end}]


def table_rows(everything: list[Runs]) -> list[dict[str, str]]:
    """The table as text: means over the seeds, spread as largest minus smallest."""
    rows = []
    baseline = _dense_loss(everything)
    for runs in everything:
        loss, sent = runs.values("validation_loss"), runs.values("sent_bytes").mean()
        row = {"method": runs.name, "loss": f"{loss.mean():.4f}", "spread": f"{np.ptp(loss):.4f}"}
        if baseline:
            row["to dense"] = f"{100 * (loss.mean() / baseline - 1):+.1f} %"
        accuracy = runs.values("validation_accuracy")
        if np.isfinite(accuracy).all():
            row["accuracy"] = f"{accuracy.mean():.4f}"
        row |= {
            "steps": str(runs.summaries[0]["steps"]),
            "sent": human_bytes(sent),
            "fewer bytes": f"{runs.values('dense_bytes').mean() / max(sent, 1):.1f} x",
            "2nd half": f"{_second_half(runs):.1f} x",
            "meetings": f"{runs.values('sync_step').mean():.0f}",
            "largest step": human_bytes(runs.values("largest_step_bytes").mean()),
            "seconds": f"{np.median(runs.values('seconds')):.1f}",
        }
        rows.append(row)
    return rows


def _dense_loss(everything: list[Runs]) -> float | None:
    """Mean loss of the first config that sends what a dense average would."""
    for runs in everything:
        if np.allclose(runs.values("dense_over_sent"), 1.0, atol=0.01):  # metrics travel, too
            return runs.values("validation_loss").mean()
    return None


def _second_half(runs: Runs) -> float:
    """Dense bytes over sent bytes from the first evaluation in the second half to the end."""
    ratios = []
    for summary, curve in zip(runs.summaries, runs.curves):
        steps = summary["steps"]
        start = next((p for p in curve if p["step"] >= steps / 2), None)
        if start is None or start["step"] == steps:
            return float("nan")
        dense = summary["dense_bytes"] * (1 - start["step"] / steps)
        ratios.append(dense / max(summary["sent_bytes"] - start["sent_bytes"], 1))
    return float(np.mean(ratios))


def settings(configs: dict[str, Config]) -> list[dict[str, str]]:
    """What each config ran: a row of the report's second table."""
    return [
        {
            "method": name,
            "peak rate": f"{c.learning_rate.peak:g}",
            "tx": f"`{c.tx}`",
            "sync": f"`{c.sync}`" if c.sync else "",
        }
        for name, c in configs.items()
    ]


def _print(rows: list[dict[str, str]]) -> None:
    table = Table()
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    wide = None if Console().is_terminal else 160  # a pipe is not 80 columns wide
    Console(width=wide).print(table)


def write_report(
    rows: list[dict[str, str]], ran: list[dict[str, str]], path: Path, command: str
) -> None:
    """table.csv, and report.md with the table, the figure and what each config ran."""
    with (path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["# Comparison", "", f"    {command}", ""] if command else ["# Comparison", ""]
    lines += _markdown(rows)
    lines += [
        "",
        "Loss: validation, mean over the seeds; spread: largest minus smallest. Fewer bytes:",
    ]
    lines += ["those of a dense average in every step over those sent, in the whole run and in its"]
    lines += [
        "second half. Largest step: the most a worker sends in one step. Seconds: median; the"
    ]
    lines += ["machine may have been shared.", ""]
    lines += ["![validation loss against steps, bytes and seconds](figure.png)", ""]
    (path / "report.md").write_text("\n".join([*lines, *_markdown(ran), ""]))


def _markdown(rows: list[dict[str, str]]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return lines + ["| " + " | ".join(row.values()) + " |" for row in rows]


def draw(everything: list[Runs], path: Path) -> None:
    """Validation loss against steps, bytes and seconds; every curve is named at the right.

    A curve is over the steps at which every seed was evaluated.
    """
    if (plt := pyplot()) is None:
        return
    height = max(4.5, 0.3 * len(everything))
    figure, axes = plt.subplots(1, 3, figsize=(15, height), sharey=True, layout="constrained")
    panels = (("step", "steps", "linear"), ("sent_bytes", "bytes sent by a worker", "log"))
    panels += (("seconds", "seconds", "linear"),)
    task = {runs.name.partition("_")[0] for runs in everything}  # lm_, digits_: the same for all
    common = task.pop() + "_" if len(task) == 1 else ""
    curves = [_common(runs.curves) for runs in everything]
    for axis, (key, label, scale) in zip(axes, panels):
        ends = []
        for i, runs in enumerate(everything):
            x = np.mean([[float(p[key]) for p in curve] for curve in curves[i]], axis=0)
            y = np.array([[float(p["validation_loss"]) for p in curve] for curve in curves[i]])
            keep = x > 0 if scale == "log" else slice(None)
            style = {"color": _colour(i), "linestyle": ("-", "--")[i % 2], "marker": "os^D"[i % 4]}
            axis.plot(x[keep], y.mean(0)[keep], markersize=3.5, linewidth=1.3, **style)
            axis.fill_between(
                x[keep], *np.stack([y.min(0), y.max(0)])[:, keep], alpha=0.08, color=_colour(i)
            )
            name = runs.name.removeprefix(common)
            ends.append((name, y.mean(0)[-1], style))
        axis.set(xlabel=label, xscale=scale, yscale="log")
        if scale == "log":
            axis.xaxis.set_minor_formatter("")  # they would overlap
        axis.grid(alpha=0.25, which="both")
        if axis is axes[-1]:
            _name_ends(axis, ends)
    axes[0].set_ylabel("validation loss")
    axes[0].yaxis.set_minor_formatter("{x:.3g}")
    axes[0].yaxis.set_major_formatter("{x:.3g}")
    for kind in ("png", "svg"):
        figure.savefig(path / f"figure.{kind}", dpi=110)
    plt.close(figure)


def _common(curves: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The points at the steps that all curves have; the last one is among them."""
    steps = set.intersection(*({point["step"] for point in curve} for curve in curves))
    return [[point for point in curve if point["step"] in steps] for curve in curves]


def _colour(number: int):
    """Of 20, the saturated ten first."""
    import matplotlib

    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return matplotlib.colormaps["tab20"](order[number % 20])


def _name_ends(axis, ends) -> None:
    """Names beside the right edge, with the curves' marks, in the order of the final losses."""
    low, high = 0.01, 0.99
    ranked = sorted(ends, key=lambda end: end[1])
    for i, (name, value, style) in enumerate(ranked):
        y = low + (high - low) * i / max(len(ranked) - 1, 1)
        text = f"{name}  {value:.4g}"
        axis.annotate(text, (1.1, y), xycoords="axes fraction", va="center", fontsize=9)
        axis.plot(
            (1.02, 1.08), (y, y), transform=axis.transAxes, clip_on=False, markersize=4, **style
        )


def main(_: list[str]) -> None:
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    configs = load_configs(FLAGS.configs)
    for config in configs.values():
        set_fields(config, FLAGS.set)
    job.export()
    for config in sorted(configs.values(), key=lambda c: bool(c.background and c.sync)):
        setup_devices(config)  # the last one needs the most
    initialize()
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
    job.define_flags()
    command_line.run(main)
