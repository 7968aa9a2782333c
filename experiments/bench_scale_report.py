"""The rows of `experiments.bench scale` as markdown and as a figure."""

import functools
from pathlib import Path

import jax

import jaxcomm
from experiments.bench_scale_cases import (
    MANY_LEAVES,
    METHODS,
    RAW,
    ROUND,
    make_step,
    mlp,
    mlp_batch,
    mlp_loss,
)
from experiments.figures import pyplot
from experiments.probe import LATENCY, throttled_link
from jaxcomm.traffic.link import ETHERNET

ORDER = (*METHODS, *MANY_LEAVES[4:])
GROW = ("workers", "parameters", "leaves")
CURVE = (2, 4, 8, 16, 64, 256, 1024, 4096)
MOST_GROWTH, MOST_ERROR = 1.3, 0.15


@functools.cache
def traffic_of(method: str, workers: int) -> jaxcomm.Traffic:
    """What a step of the hosts' model sends; traced, nothing runs."""
    step = make_step(method, mlp_loss, simulate=workers)
    state = step.abstract_state(mlp(), jax.random.key(0))
    shape = lambda x: jax.ShapeDtypeStruct((workers * x.shape[0], *x.shape[1:]), x.dtype)
    return jaxcomm.traffic(step, state, jax.tree.map(shape, mlp_batch(1)))


def predicted(
    method: str, workers: int, rate: str, compute: float, host: float = 0.0
) -> jaxcomm.Prediction:
    """What `plan` says of a step of the hosts' model."""
    link = throttled_link(rate)
    rare = 1 / ROUND if method == "local" else 1.0
    traffic = traffic_of(method, workers)
    seconds = {"compute_seconds": compute, "host_seconds": host}
    return jaxcomm.predict(traffic, link, rounds_per_step=rare, **seconds)


def host_seconds(rows: list[dict], method: str, hosts: int) -> float:
    """What a method's communication takes on loopback, if that was measured."""
    found = [r for r in rows if (r["method"], r["hosts"], r["rate"]) == (method, hosts, RAW)]
    return max(0.0, found[0]["seconds"] - found[0]["compute_seconds"]) if found else 0.0


def report(alone: list[dict], between: list[dict]) -> str:
    """Everything as markdown."""
    lines = ["# Cost as the work grows", "", "    python -m experiments.bench scale", ""]
    for grows in GROW:
        for rows in series(alone, grows):
            lines += [*_growth(grows, rows), ""]
    if between:
        lines += [*_predictions(between), "", *_curve(between), ""]
    return "\n".join(lines).rstrip() + "\n"


def series(rows: list[dict], grows: str) -> list[list[dict]]:
    """The rows of one kind of growth; those of leaves once for each total and computation."""
    mine = [row for row in rows if row["grows"] == grows]
    kind = lambda row: grows == "leaves" and (row["examples"], row["parameters"])
    return [[row for row in mine if kind(row) == one] for one in sorted({*map(kind, mine)})]


def growth(rows: list[dict], grows: str, field: str, method: str) -> float | None:
    """How often the largest case's figure is the smallest one's."""
    mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r[grows])
    if len(mine) < 2 or not mine[0][field]:
        return None
    return mine[-1][field] / mine[0][field]


def added_seconds(rows: list[dict], row: dict) -> float | None:
    """What communication adds to the step, beside the same step without it."""
    same = lambda r: all(r[k] == row[k] for k in (*GROW, "examples")) and r["method"] == "none"
    bare = next((r["seconds"] for r in rows if same(r)), None)
    return None if bare is None else row["seconds"] - bare


def _growth(grows: str, rows: list[dict]) -> list[str]:
    title = {
        "workers": "Simulated workers on one device. Linear cost is the same time for each worker.",
        "parameters": "Parameters, 4 simulated workers.",
        "leaves": "The same parameters in more leaves, 3 simulated workers, nothing on a wire.",
    }
    total = f" of {_total(rows)}" if grows == "leaves" else ""
    lines = [f"## {grows.capitalize()}{total}", "", title[grows]]
    if grows == "leaves":
        lines += [_computation(rows[0]["examples"])]
    lines += ["`none` is the same step of workers that never communicate (loss, gradient, SGD);"]
    lines += ["`added` is what a method's step takes beyond it.", ""]
    unit = {"workers": "us / worker", "parameters": "ns / parameter", "leaves": "us / leaf"}[grows]
    scale = 1e9 if grows == "parameters" else 1e6
    lines += [
        f"| method | {grows} | seconds | added | {unit} | trace | compile | memory MB | "
        "collectives | load |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = lambda row: (ORDER.index(row["method"]), row[grows])
    for row in sorted(rows, key=order):
        added = added_seconds(rows, row)
        lines.append(
            f"| {row['method']} | {row[grows]:,} | {row['seconds']:.4f} | "
            f"{'' if added is None else f'{added:.4f}'} | "
            f"{scale * row['seconds'] / row[grows]:.2f} | {row['trace_seconds']:.1f} | "
            f"{row['compile_seconds']:.1f} | {row['memory_bytes'] / 1e6:.0f} | "
            f"{row['collectives']} | {row['load']:.1f} |"
        )
    lines.append("")
    for method in dict.fromkeys(row["method"] for row in sorted(rows, key=order)):
        times = growth(rows, grows, "seconds", method)
        if times is None:
            continue
        span = [r[grows] for r in rows if r["method"] == method]
        text = f"- {method}: {max(span) / min(span):,.0f} times the {grows}, "
        text += f"{times:.2f} times the seconds a step"
        if (calls := growth(rows, grows, "collectives", method)) is not None:
            text += f", {calls:.2f} times the collectives"
        if grows == "leaves":
            text += f" (at most {MOST_GROWTH} is wanted)"
        lines.append(text)
    return lines


def _total(rows: list[dict]) -> str:
    computing = ", computing" if rows[0]["examples"] else ""
    return f"{rows[0]['parameters']:,} parameters{computing}"


def _computation(examples: int) -> str:
    if not examples:
        return "The loss is next to no computation: what is left is what leaves cost."
    return f"The leaves, joined, are ten layers, which {examples:,} examples of each worker pass."


def _predictions(rows: list[dict]) -> list[str]:
    lines = [
        "## Predicted and measured",
        "",
        f"A model of {rows[0]['parameters']:,} parameters on real hosts: medians of the slowest",
        "host. `alone` is the same step with the communication removed, all hosts at once. The",
        "prediction is `jaxcomm.predict` with it, with what the method's communication takes on",
        f"raw loopback (step minus alone), {ETHERNET} bytes on the wire a byte (frame headers),",
        f"{1e6 * LATENCY:.0f} us a message and a bucket's burst. Local meets every {ROUND} steps.",
        "",
        "| hosts | link | method | sent bytes | alone | predicted | measured | ratio | load |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    ratios = []
    for row in sorted(rows, key=lambda r: (r["hosts"], r["rate"], METHODS.index(r["method"]))):
        method, hosts, rate, compute = (
            row[k] for k in ("method", "hosts", "rate", "compute_seconds")
        )
        guess, ratio = "", ""
        if rate != RAW:
            seconds = predicted(method, hosts, rate, compute, host_seconds(rows, method, hosts))
            ratios.append(seconds.step_seconds / row["seconds"])
            guess, ratio = f"{seconds.step_seconds:.4f}", f"{ratios[-1]:.2f}"
        lines.append(
            f"| {hosts} | {rate} | {method} | {row['sent_bytes']:,.0f} | {compute:.4f} | "
            f"{guess} | {row['seconds']:.4f} | {ratio} | {row['load']:.1f} |"
        )
    inside = sum(abs(ratio - 1) <= MOST_ERROR for ratio in ratios)
    lines += ["", f"{inside} of {len(ratios)} predictions within {MOST_ERROR:.0%}."]
    return lines


def _throttled(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["rate"] for row in rows if row["rate"] != RAW))


def _compute(rows: list[dict], method: str, rate: str) -> float | None:
    mine = [r for r in rows if (r["method"], r["rate"]) == (method, rate)]
    return min(mine, key=lambda r: r["hosts"])["compute_seconds"] if mine else None


def _curve(rows: list[dict]) -> list[str]:
    lines = [
        "## To 4,096 workers",
        "",
        "Predicted seconds a step, with the computation measured on the fewest hosts. A gather",
        "receives every worker's message; decoding more of them than those hosts did is left out.",
        "",
        "| link | method | " + " | ".join(f"{n:,}" for n in CURVE) + " |",
        "|---|---|" + "--:|" * len(CURVE),
    ]
    for rate in _throttled(rows):
        for method in METHODS[1:]:
            if (compute := _compute(rows, method, rate)) is not None:
                seconds = [predicted(method, n, rate, compute).step_seconds for n in CURVE]
                cells = " | ".join(f"{s:.3g}" for s in seconds)
                lines.append(f"| {rate} | {method} | {cells} |")
    return lines


def draw(alone: list[dict], between: list[dict], path: Path) -> None:
    """Seconds a step against what grows; the prediction with the measured points on it."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    names = ("gray", "black", "blue", "orange", "green", "cyan", "red")
    colours = dict(zip(ORDER, (name if name == "black" else f"tab:{name}" for name in names)))
    for axis, grows in zip(axes, GROW):
        for rows, style in zip(series(alone, grows), ("o-", "s--", "^:")):
            total = f", {_total(rows)}" if grows == "leaves" else ""
            for method in ORDER:
                points = sorted((r[grows], r["seconds"]) for r in rows if r["method"] == method)
                if points:
                    axis.loglog(
                        *zip(*points), style, color=colours[method], label=f"{method}{total}"
                    )
        axis.set(xlabel=grows, ylabel="seconds a step")
    last = axes[-1]
    for rate, style in zip(_throttled(between), ("-", "--", ":", "-.")):
        for method in METHODS[1:]:
            if (compute := _compute(between, method, rate)) is None:
                continue
            curve = [predicted(method, n, rate, compute).step_seconds for n in CURVE]
            last.loglog(CURVE, curve, style, color=colours[method], label=f"{method}, {rate}")
            points = [
                (r["hosts"], r["seconds"])
                for r in between
                if (r["method"], r["rate"]) == (method, rate)
            ]
            last.loglog(*zip(*points), "o", color=colours[method])
    last.set(xlabel="workers", ylabel="seconds a step: predicted, measured (dots)")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
