"""The reports as tables for people (rich)."""

import io
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from jaxcomm.traffic.advice import WITHOUT, Advice
from jaxcomm.traffic.ledger import Collective, Traffic
from jaxcomm.traffic.link import Link
from jaxcomm.traffic.prediction import Prediction


def print_traffic(report: Traffic, console: Console | None = None) -> None:
    """Prints the account of a step: a line for each collective, the sums, what was left dense."""
    (console or Console()).print(traffic_table(report))


def print_advice(advice: Advice, console: Console | None = None) -> None:
    """Prints step times with and without compression, and where each method pays."""
    (console or Console()).print(advice_table(advice))


def as_text(table: Table, width: int = 110) -> str:
    """The table as plain text."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(table)
    return out.getvalue().rstrip("\n")


def traffic_table(report: Traffic) -> Table:
    """What one worker sends, collective by collective."""
    table = Table(
        title=f"what one of {report.workers} workers sends ({report.elements:,} parameters)",
        caption=_caption(report),
        caption_justify="left",
    )
    for name in ("when", "exchange", "collective", "axis", "operand", "part", "kind"):
        table.add_column(name)
    table.add_column("sent", justify="right")
    for c in sorted(report.collectives, key=lambda c: c.when):
        operand = f"{c.dtype}{list(c.shape)}" + (f" x {c.times}" if c.times > 1 else "")
        sent = bytes_text(c.sent_bytes)
        names = (_when(c), c.exchange, c.op, ",".join(c.axes))
        table.add_row(*names, operand, c.part, c.kind, sent)
    table.add_section()
    if report.sync_only:
        low, high = report.smallest_step_bytes, report.largest_step_bytes
        table.add_row("cheapest step", *[""] * 6, bytes_text(low))
        table.add_row("dearest step", *[""] * 6, bytes_text(high))
    else:
        table.add_row("a step", *[""] * 6, bytes_text(report.every_step_bytes))
    for kind, total in report.by("kind").items():
        table.add_row("", *[""] * 5, kind, bytes_text(total))
    table.add_row("dense", *[""] * 6, bytes_text(report.dense_equivalent_bytes))
    return table


def _caption(report: Traffic) -> str:
    if not report.left_dense:
        return "nothing is left dense inside a compressed method"
    lines = (
        f"left dense by {note.where} ({note.reason}): {', '.join(note.leaves)}"
        for note in report.left_dense
    )
    return "\n".join(lines)


def _when(c: Collective) -> str:
    if not c.when:
        return "every step"
    return ", ".join(f"conditional {name} {'yes' if b else 'no'}" for name, b in c.when)


def advice_table(advice: Advice) -> Table:
    """A line for each method on this link."""
    link = advice.link
    name = str(link) if isinstance(link, Link) else ", ".join(f"{k} {v}" for k, v in link.items())
    ranges = "; ".join(_range_text(r.method, r.low, r.high) for r in advice.ranges)
    table = Table(title=f"a step on {name}", caption=f"best: {ranges}", caption_justify="left")
    table.add_column("method")
    columns = ("sent", "compute", "codec", "latency", "transfer", "step", "speed-up", "pays below")
    for column in columns:
        table.add_column(column, justify="right")
    for method, p in advice.predictions.items():
        times = (p.compute_seconds, p.codec_seconds, p.latency_seconds, p.transfer_seconds)
        cells = [bytes_text(p.bytes_per_step), *map(seconds_text, (*times, p.step_seconds))]
        pays = "" if method == WITHOUT else bandwidth_text(advice.break_even[method])
        table.add_row(method, *cells, f"{advice.speedup(method):.2f}", pays)
    return table


def grid_table(title: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence]):
    """A plain grid: a name and a cell for each column."""
    table = Table(title=title, padding=(0, 0))
    table.add_column(corner)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *map(str, cells))
    return table


def prediction_text(with_: Prediction, without: Prediction) -> str:
    """`with / without` step times, in one cell."""
    return f"{seconds_text(with_.step_seconds)} / {seconds_text(without.step_seconds)}"


def bytes_text(value: float) -> str:
    """Bytes with a decimal prefix."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    return _in_units(value, units) if value >= 999.5 else f"{value:.0f} B"


def seconds_text(value: float) -> str:
    """Seconds, milliseconds or microseconds, three digits."""
    return _in_units(value, {"s": 1.0, "ms": 1e-3, "us": 1e-6}) if value else "0"


def bandwidth_text(value: float) -> str:
    """Bits a second with a decimal prefix; 'never' and 'always' at the ends."""
    if value == 0:
        return "never"
    if value == float("inf"):
        return "always"
    units = {"Tbit/s": 1e12, "Gbit/s": 1e9, "Mbit/s": 1e6, "kbit/s": 1e3, "bit/s": 1.0}
    return _in_units(value, units)


def _in_units(value: float, units: Mapping[str, float]) -> str:
    """Three digits, in the largest unit of which there is one, or else the smallest."""
    rounded = float(f"{value:.3g}")  # 999,600 bytes are 1 MB, not 1e+03 kB
    unit = next((u for u, size in units.items() if rounded >= size), [*units][-1])
    digits = ".3g" if rounded < 1000 * units[unit] else ",.0f"
    return f"{value / units[unit]:{digits}} {unit}"


def _range_text(method: str, low: float, high: float) -> str:
    if low == 0 and high == float("inf"):
        return f"{method} at any bandwidth"
    if high == float("inf"):
        return f"{method} above {bandwidth_text(low)}"
    return (
        f"{method} up to {bandwidth_text(high)}"
        if low == 0
        else (f"{method} from {bandwidth_text(low)} to {bandwidth_text(high)}")
    )
