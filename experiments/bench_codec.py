"""Codec throughput: encode and decode of every compressor beside a plain copy of its input.

For each size the copy, encode and decode programs run in turn, `repeats` times over, and medians
are compared: a machine whose speed drifts slows all three. Throughput counts bytes of float32
input, so the copy's own figure is 4 d / seconds (it reads and writes that much). For figures of one
core start Python with XLA_FLAGS=--xla_cpu_multi_thread_eigen=false under `taskset -c 0`.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxcomm import compressors


@dataclasses.dataclass(frozen=True)
class Row:
    """One compressor at one size; throughputs in 1e9 bytes of float32 input a second."""

    compressor: str
    size: int
    encode_gbs: float
    decode_gbs: float
    copy_gbs: float
    encode_ratio: float  # encode / copy throughput
    decode_ratio: float
    both_ratio: float  # encode then decode, against one copy
    payload_bytes: int
    temp_bytes: int  # peak temporary memory of the larger program


def table() -> dict[str, compressors.Compressor]:
    """What is measured: every family at its usual setting."""
    c = compressors
    return {
        "identity": c.identity(),
        "cast bf16": c.cast("bfloat16"),
        "cast fp16": c.cast("float16"),
        "cast e4m3": c.cast("float8_e4m3fn"),
        "cast e5m2": c.cast("float8_e5m2"),
        "sign l1": c.sign(),
        "sign l2": c.sign("l2"),
        "sign l1 block 1024": c.sign(block_size=1024),
        "top_k 1%": c.top_k(0.01),
        "block_top_k 1%": c.block_top_k(0.01),
        "threshold_top_k 1%": c.threshold_top_k(0.01),
        "rand_k 1%": c.rand_k(0.01),
        "quantize 8": c.quantize(8),
        "quantize 4": c.quantize(4),
        "quantize 2": c.quantize(2),
        "ternary": c.ternary(),
        "quantize 8 minmax": c.quantize(8, scheme="minmax"),
        "quantize 8 stochastic": c.quantize(8, rounding="stochastic"),
        "quantize 8 shift": c.quantize(8, rounding="shift"),
        "qsgd 127": c.qsgd(127),
        "natural": c.natural(),
        "natural_dithering 7": c.natural_dithering(7),
        "fp4_e3m0": c.fp4_e3m0(),
        "kmeans 3": c.kmeans(3),
        "dct_top_k 4/64": c.dct_top_k(4, 64),
        "block_top_k 1% + 2 bits": c.compose(c.block_top_k(0.01), c.quantize(2)),
    }


def _seconds(program: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def _temp(program) -> int:
    analysis = program.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def measure(name: str, c: compressors.Compressor, size: int, repeats: int) -> Row:
    """Times one compressor at one size."""
    x = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    key = jax.random.key(1)
    copy = jax.jit(lambda v: v.copy()).lower(x).compile()
    encode = jax.jit(c.encode).lower(x, key).compile()
    payload = encode(x, key)
    decode = jax.jit(lambda p: c.decode(p, size)).lower(payload).compile()
    runs = [
        (_seconds(copy, x), _seconds(encode, x, key), _seconds(decode, payload))
        for _ in range(repeats + 1)
    ][1:]
    copied, encoded, decoded = (statistics.median(column) for column in zip(*runs))
    speed = lambda seconds: 4 * size / seconds / 1e9
    return Row(
        compressor=name,
        size=size,
        encode_gbs=speed(encoded),
        decode_gbs=speed(decoded),
        copy_gbs=speed(copied),
        encode_ratio=copied / encoded,
        decode_ratio=copied / decoded,
        both_ratio=copied / (encoded + decoded),
        payload_bytes=c.payload_bytes(size),
        temp_bytes=max(_temp(encode), _temp(decode)),
    )


def run(
    sizes: Sequence[int] = (100_000, 1_000_000, 10_000_000),
    repeats: int = 9,
    only: Sequence[str] | None = None,
) -> list[Row]:
    """A row for each compressor (those whose name starts with one of `only`) and size."""
    names = [n for n in table() if only is None or n.startswith(tuple(only))]
    return [measure(n, table()[n], size, repeats) for size in sizes for n in names]


def print_table(rows: Sequence[Row]) -> None:
    """Plain text, one line a row."""
    heads = ("size", "encode", "decode", "copy", "enc/copy", "dec/copy", "both/copy", "temp MB")
    print(f"{'compressor':26s}" + "".join(f"{head:>11s}" for head in heads), flush=True)
    for r in rows:
        speeds = (r.encode_gbs, r.decode_gbs, r.copy_gbs)
        ratios = (r.encode_ratio, r.decode_ratio, r.both_ratio)
        cells = [f"{r.size:11.0e}", *(f"{v:11.2f}" for v in (*speeds, *ratios))]
        print(f"{r.compressor:26s}" + "".join(cells) + f"{r.temp_bytes / 1e6:11.1f}", flush=True)
    print("GB of float32 input a second; medians; the copy reads and writes that many bytes.")


def main(argv: Sequence[str]) -> None:
    """python -m experiments.bench_codec SIZE [SIZE ...]"""
    print_table(run([_size(word) for word in argv] or (100_000, 1_000_000, 10_000_000)))


def _size(word: str) -> int:
    """The number of elements that an argument such as 1e6 says.

    Raises:
      ValueError: not a number, or below 1.
    """
    try:
        size = int(float(word))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"a size is a number of elements such as 1e6, got {word!r}")
    return size


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
