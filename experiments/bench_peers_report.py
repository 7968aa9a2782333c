"""The rows of `experiments.bench peers` as markdown and a figure.

    exposed  = a step - the same step with its communication removed (codecs stay)
    overhead = a step - the library's own step without an exchange or a codec

`alone` of PyTorch is the same hook in a group of one, `local` is DDP's `no_sync`.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.bench_peers_cases import BY_NAME, DENSE, RAW
from experiments.figures import pyplot

Rows = dict[tuple, dict]
PLAN_ERROR = 0.15  # of a prediction, at most
SYNC = lambda name: not BY_NAME[name].rounds


def index(rows: Iterable[dict]) -> Rows:
    """Rows by (kind, size, method, hosts, rate)."""
    return {tuple(r[k] for k in ("kind", "size", "method", "hosts", "rate")): r for r in rows}


def seconds_by_kind(row: dict, of: str = "steps") -> dict[str, float]:
    """Median seconds of each kind of step, or of its `alones`."""
    kinds = dict.fromkeys(row["kinds"])
    pairs = list(zip(row["kinds"], row[of]))
    return {k: statistics.median([s for kind, s in pairs if kind == k]) for k in kinds}


def clock(rows: Rows, method: str, hosts: int, rate: str, of: str = "steps") -> np.ndarray | None:
    """Seconds at the end of every batch of the training on a link, or None if not measured.

    A kind of step that was not timed costs what a dense step of DDP costs (DDP's own warm-up), or
    else what the method's dearest one does.
    """
    run = rows.get(("loss", "small", method, hosts, RAW))
    timed = rows.get(("time", "small", method, hosts, rate))
    dense = rows.get(("time", "small", DENSE, hosts, rate))
    if run is None or timed is None:
        return None
    known = seconds_by_kind(timed, of)
    if dense is not None:
        known.setdefault("dense", dense["step" if of == "steps" else "alone"])
    dearest = max(known[kind] for kind in timed["kinds"])
    parts = BY_NAME[method].parts
    return np.cumsum([known.get(kind, dearest) for kind in run["kinds"]])[parts - 1 :: parts]


def step_seconds(rows: Rows, method: str, size: str, hosts: int, rate: str) -> float:
    """Seconds of a batch: the median, or of a local method the mean over its training."""
    if SYNC(method):
        return rows["time", size, method, hosts, rate]["step"]
    return _mean(clock(rows, method, hosts, rate))


def alone_seconds(rows: Rows, method: str, size: str, hosts: int, rate: str) -> float:
    """Seconds of a step without its communication, in the same sense."""
    if SYNC(method):
        return rows["time", size, method, hosts, rate]["alone"]
    return _mean(clock(rows, method, hosts, rate, "alones"))


def _mean(times: np.ndarray | None) -> float:
    assert times is not None
    return times[-1] / len(times)


def exposed(rows: Rows, method: str, size: str, hosts: int, rate: str) -> float:
    """Seconds a step that communication takes."""
    where = rows, method, size, hosts, rate
    return step_seconds(*where) - alone_seconds(*where)


def overhead(rows: Rows, method: str, size: str, hosts: int, rate: str) -> float:
    """Seconds a step that the exchange takes, its codec included."""
    row = rows["time", size, method, hosts, rate]
    return step_seconds(rows, method, size, hosts, rate) - BY_NAME[method].parts * row["local"]


def seeds(rows: Rows, method: str, hosts: int) -> int:
    """Trainings of a method; 0 if there are none."""
    run = rows.get(("loss", "small", method, hosts, RAW))
    return 0 if run is None else len(run.get("curves", [0]))


def losses(rows: Rows, method: str, hosts: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and validation losses at them, the mean of the first seeds."""
    run = rows["loss", "small", method, hosts, RAW]
    curves = np.array(run.get("curves", [run["curve"]])[:count])
    return curves[0, :, 0].astype(int), curves[:, :, 1].mean(0)


def curve(
    rows: Rows, method: str, hosts: int, rate: str, count: int = 1
) -> tuple[np.ndarray, np.ndarray] | None:
    """Seconds and validation losses of a training on a link; the mean of the first seeds."""
    times = clock(rows, method, hosts, rate)
    if times is None:
        return None
    steps, means = losses(rows, method, hosts, count)
    return np.concatenate([[0.0], times])[steps], means


def final_loss(rows: Rows, method: str, hosts: int, count: int = 1) -> float:
    """Validation loss at the end of the training; the mean of the first seeds."""
    return float(losses(rows, method, hosts, count)[1][-1])


def seconds_to(
    rows: Rows, method: str, hosts: int, rate: str, target: float, count: int = 1
) -> float | None:
    """Wall time at which the validation loss (the seeds' mean) first is at most `target`."""
    found = curve(rows, method, hosts, rate, count)
    if found is None or not (found[1] <= target).any():
        return None
    return float(found[0][found[1] <= target][0])


def checks(rows: Rows, hosts: int) -> list[tuple[str, str, bool]]:
    """What the comparison is to show: (statement, figures, whether it holds)."""
    large = lambda rate: [m for m in BY_NAME if ("time", "large", m, hosts, rate) in rows]
    found = []

    def compare(text: str, rate: str, one: str, other: str, factor: float) -> None:
        if one not in large(rate) or other not in large(rate):
            return
        for what, figure in (("exposed", exposed), ("overhead", overhead)):
            a, b = (figure(rows, m, "large", hosts, rate) for m in (one, other))
            figures = f"{what}: {a:.3f} s against {b:.3f} s, {b / max(a, 1e-4):.1f} times less"
            found.append((text, figures, b >= factor * a))

    slow, slower = "100mbit", "10mbit"
    compare(f"dense no more than DDP's, {slow}", slow, "jaxcomm dense", DENSE, 1)
    sign = "jaxcomm sign, two-phase"
    compare(f"sign at least 25 x less than dense, {slow}", slow, sign, "jaxcomm dense", 25)
    pair = "jaxcomm PowerSGD r4", "DDP PowerSGD r4"
    compare(f"PowerSGD r4 no more than DDP's, {slow}", slow, *pair, 1)
    pair = "jaxcomm PowerSGD r4, 8 bits", "DDP PowerSGD r4"
    if all(seeds(rows, m, hosts) for m in pair):
        text = f"{pair[0]} no more than {pair[1]} ({_two_losses(rows, *pair, hosts)}), {slow}"
        compare(text, slow, *pair, 1)
    if best := _best_pair(rows, hosts, slower, large(slower)):
        ours, theirs = best
        figures = _two_losses(rows, ours, theirs, hosts)
        text = f"{ours} at least 1.5 x less than {theirs} ({figures}), {slower}"
        compare(text, slower, ours, theirs, 1.5)
    for rate, factor in ((slow, 10), (slower, 40)):
        found += _local_check(rows, hosts, rate, factor)
    return found


def _best_pair(rows: Rows, hosts: int, rate: str, names: list[str]) -> tuple[str, str] | None:
    """Our synchronous method that exposes least at a loss no worse, and DDP's best hook."""
    trained = [m for m in names if SYNC(m) and ("loss", "small", m, hosts, RAW) in rows]
    least = lambda ms: min(ms, key=lambda m: exposed(rows, m, "large", hosts, rate), default=None)
    theirs = least([m for m in trained if BY_NAME[m].library == "torch"])
    if theirs is None:
        return None
    limit = final_loss(rows, theirs, hosts)
    ours = [m for m in trained if BY_NAME[m].library == "jaxcomm"]
    best = least([m for m in ours if final_loss(rows, m, hosts) <= limit])
    return best and (best, theirs)


def _two_losses(rows: Rows, one: str, other: str, hosts: int) -> str:
    return f"losses {final_loss(rows, one, hosts):.3f} and {final_loss(rows, other, hosts):.3f}"


def _local_check(rows: Rows, hosts: int, rate: str, factor: float) -> list[tuple]:
    """Of local methods that were trained with as many seeds as DDP was: means over them.

    To dense's final loss, and to one standard error of that mean above it.
    """
    local = [m for m in BY_NAME if not SYNC(m) and BY_NAME[m].library == "jaxcomm"]
    timed = [m for m in local if clock(rows, m, hosts, rate) is not None]
    count = min(seeds(rows, DENSE, hosts), max((seeds(rows, m, hosts) for m in timed), default=0))
    if not count or clock(rows, DENSE, hosts, rate) is None:
        return []
    rivals = [m for m in timed if seeds(rows, m, hosts) >= count]

    def compare(target: float, text: str) -> tuple[str, str, bool]:
        dense = seconds_to(rows, DENSE, hosts, rate, target, count)
        assert dense is not None  # at its end at the latest
        times = {m: seconds_to(rows, m, hosts, rate, target, count) for m in rivals}
        if reached := {m: t for m, t in times.items() if t is not None}:
            best = min(reached, key=lambda m: reached[m])
            ratio = dense / reached[best]
            figures = f"{best}: {reached[best]:.1f} s against {dense:.1f} s, {ratio:.1f} times less"
            return text, figures, ratio >= factor
        nearest = min(rivals, key=lambda m: final_loss(rows, m, hosts, count))
        end, clocked = final_loss(rows, nearest, hosts, count), clock(rows, nearest, hosts, rate)
        assert clocked is not None
        figures = f"not reached; {nearest} ends at {end:.3f} after {clocked[-1]:.1f} s, "
        return text, figures + f"{dense / clocked[-1]:.1f} times less", False

    target = final_loss(rows, DENSE, hosts, count)
    targets, of = {f"{target:.3f}": target}, ""
    if count > 1:
        ends = [run[-1][1] for run in rows["loss", "small", DENSE, hosts, RAW]["curves"][:count]]
        near = target + statistics.stdev(ends) / count**0.5
        targets[f"and its standard error, {near:.3f},"] = near
        of = f" (means of {count} seeds)"
    text = "wall time to the dense loss {} at least {} x less, {}{}"
    return [compare(t, text.format(name, factor, rate, of)) for name, t in targets.items()]


def report(
    rows: Iterable[dict],
    names: list[str],
    options: str = "",
    predicted: dict[tuple, tuple[float, float]] | None = None,
) -> str:
    """The results as markdown.

    Args:
      rows: what was measured.
      names: the order of the methods.
      options: of the command.
      predicted: what `bench_peers_plan.predictions` says of them.
    """
    found = index(rows)
    lines = ["# jaxcomm beside PyTorch DDP", "", f"    python -m experiments.bench peers {options}"]
    lines = [*lines[:2], lines[2].rstrip(), "", *TEXT.splitlines(), *_about(found), ""]
    for hosts in sorted({key[3] for key in found}):
        lines += [f"## {hosts} hosts", ""]
        if told := checks(found, hosts):
            lines += ["| to show | measured | holds |", "|---|---|---|"]
            lines += [f"| {a} | {b} | {'yes' if ok else 'no'} |" for a, b, ok in told]
            lines.append("")
        for size in ("large", "small"):
            lines += _times_table(found, names, size, hosts)
        lines += _loss_table(found, names, hosts)
        lines += _plan_table(predicted or {}, names, hosts)
    return "\n".join(lines).rstrip() + "\n"


TEXT = """\
Seconds a step of the slowest host, medians; one thread a process for both libraries, which both
keep freed memory (`jaxcomm.keep_memory`), warm-up left out, methods in turn in one process a host.
`exposed` is a step minus the same step with its communication removed (codecs stay; DDP: the same
hook in a group of one; jaxcomm dense, a step in pieces: the same pieces), `overhead` a step minus
the same library's step without exchange and codec (DDP: `no_sync`), both in the same run.
Bytes are those of the interface's counter, a host and step. All hosts share this machine's
cores; TCP uses CUBIC. At 10 Mbit/s connections of jaxcomm's methods are paced at the link's rate
(`jaxcomm.pace`), others are as their libraries leave them. A bucket that was silent passes 0.01 s
of bytes (32 kB at least) at once, for everybody. Trajectories do not depend on the link: losses
are those of one training without a bucket, and seconds to a loss are its steps, each at what its
kind (local, meeting, ...) costs on the link. The wall time to the dense loss is that of the mean
of several seeds, where dense and local methods have them; all else is the first seed's. `plan` is
told the computation and the codec of the same run, what the method's communication takes on raw
loopback, and the bucket.
A host's batch is 64 bytes: one window of the large model, two of the small one. `half batches`
takes a local step on each window, so that it steps twice as often on the same data as who must
exchange in every step; its figures are of a batch, as all others. Validation loss in nats a byte.
Of dense methods on the slowest link only few steps are timed.
"""


def _about(rows: Rows) -> list[str]:
    """Versions, and how busy the machine was."""
    abouts = [row["about"] for row in rows.values() if "about" in row]
    loads = [row["load"] for row in rows.values() if "load" in row]
    values: dict[str, list[str]] = {}
    for name, value in (pair for about in abouts for pair in about.items()):
        values.setdefault(name, [])
        values[name] += [value] * (value not in values[name])
    lines = [", ".join(f"{k} {' and '.join(v)}" for k, v in values.items()) + "."] if values else []
    if loads:
        span = f"{min(loads):.1f} to {max(loads):.1f}"
        lines.append(f"Processes that wanted a core in the minute before a case: {span}.")
    return lines


def _table(heads: list[str], body: list[list[str]]) -> list[str]:
    rule = "|---|" + "--:|" * (len(heads) - 1)
    return ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(r) + " |" for r in body), ""]


def _rates(rows: Rows, size: str, hosts: int) -> list[str]:
    return list(
        dict.fromkeys(k[4] for k in rows if k[0] == "time" and k[1] == size and k[3] == hosts)
    )


def _times_table(rows: Rows, names: list[str], size: str, hosts: int) -> list[str]:
    rates = _rates(rows, size, hosts)
    heads, body = ["method", "bytes a step"], []
    for rate in rates:
        heads += [f"{rate or 'raw'}: step", "exposed", "overhead"]
    for name in names:
        there = [rate for rate in rates if ("time", size, name, hosts, rate) in rows]
        if not there or (not SYNC(name) and clock(rows, name, hosts, there[0]) is None):
            continue
        timed = rows["time", size, name, hosts, there[0]]
        cells = [name, f"{BY_NAME[name].parts * timed['bytes']:,.0f}"]
        for rate in rates:
            figures = (step_seconds, exposed, overhead)
            shown = [f"{f(rows, name, size, hosts, rate):.3f}" for f in figures]
            cells += shown if rate in there else ["", "", ""]
        body.append(cells)
    title = f"Seconds a step, {size} model, {hosts} hosts:"
    return [title, "", *_table(heads, body)] if body else []


def _plan_table(predicted: dict, names: list[str], hosts: int) -> list[str]:
    """Predicted over measured seconds a step."""
    mine = {key: pair for key, pair in predicted.items() if key[2] == hosts}
    columns = list(dict.fromkeys((size, rate) for size, _, _, rate in mine))
    body = []
    for name in names:
        pairs = [mine.get((size, name, hosts, rate)) for size, rate in columns]
        if any(pairs):
            cells = [
                f"{pair[0]:.3f} / {pair[1]:.3f} = {pair[0] / pair[1]:.2f}" if pair else ""
                for pair in pairs
            ]
            body.append([name, *cells])
    if not body:
        return []
    within = sum(abs(a / b - 1) <= PLAN_ERROR for a, b in mine.values())
    title = f"`plan`'s seconds a step over the measured ones; {within} of {len(mine)} within "
    heads = ["method", *(f"{size}, {rate}" for size, rate in columns)]
    return [f"{title}{PLAN_ERROR:.0%}:", "", *_table(heads, body)]


def _loss_table(rows: Rows, names: list[str], hosts: int) -> list[str]:
    trained = [m for m in names if ("loss", "small", m, hosts, RAW) in rows]
    rates = _rates(rows, "small", hosts)
    if not trained or DENSE not in trained:
        return []
    target = final_loss(rows, DENSE, hosts)
    heads, body = ["method", "final loss"], []
    ends = {}
    for rate in rates:
        heads += [f"{rate or 'raw'}: s to {target:.3f}", "dense / this", "loss at {:.0f} s"]
        clocks = [c for m in trained if (c := clock(rows, m, hosts, rate)) is not None]
        ends[rate] = min((float(c[-1]) for c in clocks), default=0.0)
        heads[-1] = heads[-1].format(ends[rate])
    for name in trained:
        cells = [name, f"{final_loss(rows, name, hosts):.3f}"]
        for rate in rates:
            cells += _loss_cells(rows, name, hosts, rate, target, ends[rate])
        body.append(cells)
    title = f"The small model's training on {hosts} hosts; the last column of a link: at the time "
    return [title + "when its fastest method has ended.", "", *_table(heads, body)]


def _loss_cells(rows, name, hosts, rate, target, end) -> list[str]:
    found = curve(rows, name, hosts, rate)
    if found is None:
        return ["", "", ""]
    mine = seconds_to(rows, name, hosts, rate, target)
    dense = seconds_to(rows, DENSE, hosts, rate, target)
    at_end = f"{np.interp(end, *found):.3f}"
    if mine is None or dense is None:
        return ["not reached", "", at_end]
    return [f"{mine:.1f}", f"{dense / mine:.1f}", at_end]


def draw(rows: Iterable[dict], path: Path) -> None:
    """Exposed communication, and validation loss against seconds, of the most hosts."""
    if (plt := pyplot()) is None:
        return
    found = index(rows)
    hosts = max(key[3] for key in found)
    rates = [r for r in _rates(found, "large", hosts) or _rates(found, "small", hosts) if r][-2:]
    rates = rates or [RAW]
    size = (5 * (len(rates) + 1) + 2, 5)
    figure, axes = plt.subplots(1, len(rates) + 1, figsize=size, layout="constrained")
    for axis in axes[1:]:
        axis.set_prop_cycle(color=plt.get_cmap("tab20")(range(20)))  # a line for each method
    _bars(axes[0], found, hosts, rates)
    for axis, rate in zip(axes[1:], rates):
        _curves(axis, found, hosts, rate)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis, rows: Rows, hosts: int, rates: list[str]) -> None:
    names = [m for m in BY_NAME if ("time", "large", m, hosts, rates[0]) in rows]
    for i, rate in enumerate(rates):
        there = [j for j, m in enumerate(names) if ("time", "large", m, hosts, rate) in rows]
        y = [j + 0.4 * i for j in there]
        values = [max(exposed(rows, names[j], "large", hosts, rate), 1e-3) for j in there]
        axis.barh(y, values, 0.38, label=rate or "raw")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(
        xscale="log" if names else "linear",
        xlabel=f"exposed communication, s a step, {hosts} hosts",
    )
    if names:
        axis.legend(fontsize=8)


def _curves(axis, rows: Rows, hosts: int, rate: str) -> None:
    for name, method in BY_NAME.items():
        found = curve(rows, name, hosts, rate)
        if found is not None:
            style = {"torch": "--", "jax": ":"}.get(method.library, "-")
            axis.plot(found[0][1:], found[1][1:], style, label=name, linewidth=1.2)
    axis.set(
        xscale="log" if axis.lines else "linear", xlabel=f"seconds, {hosts} hosts, {rate or 'raw'}"
    )
    axis.set_ylabel("validation loss")
    if axis.lines:
        axis.legend(fontsize=6)
