"""The rows of `experiments.bench wire` as markdown."""

import dataclasses

from experiments.bench_wire_cases import BUCKETS, REPEATS, Case, timed_cases
from experiments.netns import parse_rate

CASE = tuple(field.name for field in dataclasses.fields(Case))
LOWEST, HIGHEST = 1.00, 1.08  # the counter over traffic's figure
SLOWEST = 1.15  # seconds over the larger of bytes / rate and codec


def bytes_ratio(row: dict) -> float:
    """The interface's counter over traffic's figure."""
    return row["counter_bytes"] / row["counted_bytes"]


def ideal_seconds(row: dict) -> float:
    """What the counted bytes take at the link's rate."""
    return 8 * row["counted_bytes"] / parse_rate(row["rate"])


def time_ratio(row: dict) -> float:
    """Seconds over the larger of bytes / rate and codec."""
    return row["seconds"] / max(ideal_seconds(row), row["codec_seconds"])


def is_timed(row: dict) -> bool:
    """Is it one of the timed exchanges?"""
    return Case(**{k: row[k] for k in CASE}) in timed_cases()


def report(rows: list[dict]) -> str:
    """The results as markdown."""
    lines = ["# Bytes and times on the wire", "", "    python -m experiments.bench wire", ""]
    sized = [row for row in rows if not is_timed(row)]
    if sized:
        lines += [*_bytes_table(sized), ""]
    if timed := [row for row in rows if is_timed(row)]:
        lines += _times_table(timed)
    return "\n".join(lines).rstrip() + "\n"


def _bytes_table(rows: list[dict]) -> list[str]:
    ratios = [bytes_ratio(row) for row in rows]
    frames = [r["frame_bytes"] / r["counted_bytes"] for r in rows if r["frame_bytes"]]
    exact = sum(row["counted_bytes"] == row["formula_bytes"] for row in rows)
    inside = sum(LOWEST <= ratio <= HIGHEST for ratio in ratios)
    lines = [
        "Bytes that a host sends in one exchange: as `jaxcomm.traffic` counts them, and by the",
        "counter of the host's interface. `frames` also counts the headers of every packet of",
        f"1,514 bytes, as the token bucket does. Means over the hosts and {REPEATS} exchanges.",
        "",
        f"- {inside} of {len(rows)} ratios in {LOWEST:.2f}..{HIGHEST:.2f}; "
        f"they are {min(ratios):.3f}..{max(ratios):.3f}"
        + (f", with frame headers {min(frames):.3f}..{max(frames):.3f}" if frames else ""),
        f"- {exact} of {len(rows)} figures of traffic equal the exchange's formula to the byte",
        "",
        "| compressor | exchange | hosts | elements | payload | traffic | counter | ratio "
        "| frames |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        frame = row["frame_bytes"]
        share = f"{frame / row['counted_bytes']:.3f}" if frame else ""
        lines.append(
            f"| {row['compressor']} | {row['exchange']} | {row['hosts']} | {row['elements']:,} "
            f"| {row['payload_bytes']:,} | {row['counted_bytes']:,.0f} "
            f"| {row['counter_bytes']:,.0f} | {bytes_ratio(row):.3f} | {share} |"
        )
    return lines


def _times_table(rows: list[dict]) -> list[str]:
    lines = [
        f"Seconds of one mean (the slowest host, median of {REPEATS}) beside `bytes / rate`, which",
        "is what the counted bytes need on the link, and `codec`: the same program without its",
        "collectives, run by all hosts at the same time (they share this machine's cores).",
        f"The goal is at most {SLOWEST} times the larger of the two. A token bucket lets the first",
        "0.01 s of bytes after a pause (262 kB at most) pass at once. XLA on CPU runs collectives",
        "and computation of one program one after the other, so that their sum is what to expect;",
        f"`pipelined` is jaxcomm.PipelinedMean with {BUCKETS} buckets. Each host keeps to",
        "its share of the machine's cores, one at least, and keeps the memory of freed arrays",
        "(`jaxcomm.keep_memory`).",
        "`load` is how many processes of this machine wanted its cores in the minute before.",
        "",
        "| compressor | exchange | hosts | rate | elements | bytes | bytes / rate | codec "
        "| seconds | / larger | / sum | load |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ideal, codec, seconds = ideal_seconds(row), row["codec_seconds"], row["seconds"]
        lines.append(
            f"| {row['compressor']} | {row['exchange']} | {row['hosts']} | {row['rate']} "
            f"| {row['elements']:,} | {row['counted_bytes']:,.0f} | {ideal:.3f} | {codec:.3f} "
            f"| {seconds:.3f} | {time_ratio(row):.2f} | {seconds / (ideal + codec):.2f} "
            f"| {row['load']:.1f} |"
        )
    return lines
