"""Lossless coders for quantizer symbols, on the host, for storage and upload; and FedZip.

Lengths depend on the data, so these are no part of a compiled step. Each coder turns symbols
0..k-1, k up to 65,535, into self-contained bytes and back, and the length of those bytes is the
whole truth:

  huffman   canonical Huffman code; of the header only the k code lengths are needed
  position  all symbols but the most frequent, as positions of ceil(log2 n) bits
  gap       the same by the gaps between positions, in Rice codes: gap = q 2^r + s is q zeros, a
            one, and s in r bits, with the best r of each symbol

The third stage of FedZip (Malekijoo et al., arXiv 2102.01593), whose reference counts code lengths
(2, 1, 1) for its three symbols; no prefix code has them (Kraft: 1/4 + 1/2 + 1/2 > 1).
"""

import dataclasses
import heapq
import struct
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors import packing
from jaxcomm.compressors._kmeans import kmeans
from jaxcomm.compressors._top_k import top_k
from jaxcomm.compressors.base import require_whole
from jaxcomm.compressors.sparse import check_fraction_or_k

_HEAD = "<IH"  # symbols, alphabet size


def huffman_lengths(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Bits of each symbol's Huffman code; 0 for symbols that never occur.

    With two or more symbols in use Kraft's sum of 2^-length is exactly 1. A single one needs no
    bits at all: its length is 0 too.
    """
    counts = np.asarray(counts)
    lengths = np.zeros(len(counts), np.int64)
    heap: list[tuple[int, int, tuple[int, ...]]] = [
        (int(c), s, (s,)) for s, c in enumerate(counts) if c > 0
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        (first, tie, left), (second, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[list(left + right)] += 1
        heapq.heappush(heap, (first + second, tie, left + right))
    return lengths


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols in use in code order, and their codes (uint64): shorter first, then by symbol."""
    used = np.flatnonzero(lengths)
    order = used[np.lexsort((used, lengths[used]))]
    codes, code, previous = [], 0, 0
    for length in lengths[order]:
        code <<= int(length) - previous
        codes.append(code)
        code, previous = code + 1, int(length)
    return order, np.array(codes, np.uint64)


def _flat(symbols: np.ndarray, k: int) -> np.ndarray:
    """The symbols as a flat array, or a clear error when one is none of 0..k-1."""
    symbols = np.asarray(symbols).reshape(-1)
    k = require_whole("k", k, 1, 65_535)
    if symbols.size and not (symbols.min() >= 0 and symbols.max() < k):
        low, high = symbols.min(), symbols.max()
        raise ValueError(f"symbols must be from 0 to k-1={k - 1}, got {low} to {high}")
    return symbols


def huffman_encode(symbols: np.ndarray, k: int) -> bytes:
    """Header, one length byte for each of the k symbols, and the code stream (high bits first)."""
    symbols = _flat(symbols, k)
    lengths = huffman_lengths(np.bincount(symbols, minlength=k))
    order, ordered = _canonical(lengths)
    codes = np.zeros(k, np.uint64)
    codes[order] = ordered
    mine = lengths[symbols]
    starts = np.cumsum(mine) - mine
    bits = np.zeros(int(mine.sum()), np.uint8)
    for j in range(int(lengths.max(initial=0))):
        here = np.flatnonzero(mine > j)
        shift = (mine[here] - 1 - j).astype(np.uint64)
        bits[starts[here] + j] = (codes[symbols[here]] >> shift) & np.uint64(1)
    head = struct.pack(_HEAD, len(symbols), k) + lengths.astype(np.uint8).tobytes()
    # A lone symbol has no code: the header names it.
    lone = np.flatnonzero(np.bincount(symbols, minlength=k))[:1].astype(np.uint16)
    return head + (b"" if len(bits) else lone.tobytes()) + np.packbits(bits).tobytes()


def huffman_decode(data: bytes) -> np.ndarray:
    """The symbols (uint16)."""
    count, k = struct.unpack_from(_HEAD, data)
    at = struct.calcsize(_HEAD)
    lengths = np.frombuffer(data, np.uint8, k, at).astype(np.int64)
    if count == 0 or not lengths.any():
        lone = np.frombuffer(data, np.uint16, 1, at + k) if count else [0]
        return np.full(count, lone[0], np.uint16)
    order, codes = _canonical(lengths)
    longest = int(lengths.max())
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=at + k))
    window = np.zeros(len(bits), np.uint64)  # the `longest` bits from each position on
    padded = np.concatenate([bits, np.zeros(longest, np.uint8)])
    for j in range(longest):
        window = (window << np.uint64(1)) | padded[j : j + len(bits)]
    # Left-justified canonical codes increase, so the code at a position is the last one <= window.
    justified = codes << (longest - lengths[order]).astype(np.uint64)
    which = np.searchsorted(justified, window, side="right") - 1
    step, place, places = lengths[order][which].tolist(), 0, []
    for _ in range(count):
        places.append(place)
        place += step[place]
    return order[which[places]].astype(np.uint16)


def _rare(symbols: np.ndarray, k: int) -> tuple[int, list[int]]:
    """The most frequent symbol and the others."""
    common = int(np.argmax(np.bincount(symbols, minlength=k)))
    return common, [s for s in range(k) if s != common]


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """0/1 bytes of fixed-width values, low bits first."""
    return ((values[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)


def _unpack(flat: np.ndarray, bits: int) -> np.ndarray:
    return (flat.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1)


def _sparse_encode(symbols: np.ndarray, k: int, code: Callable) -> bytes:
    """Shared by position and gap: header, then for each rare symbol a count, a parameter, bits."""
    symbols = _flat(symbols, k)
    common, rare = _rare(symbols, k)
    head, streams = struct.pack(_HEAD + "H", len(symbols), k, common), []
    for s in rare:
        where = np.flatnonzero(symbols == s)
        parameter, bits = code(where, len(symbols))
        head += struct.pack("<IB", len(where), parameter)
        streams.append(bits)
    return head + np.packbits(np.concatenate([np.zeros(0, np.uint8), *streams])).tobytes()


def _sparse_decode(data: bytes, decode: Callable) -> np.ndarray:
    count, k, common = struct.unpack_from(_HEAD + "H", data)
    at = struct.calcsize(_HEAD + "H")
    symbols = np.full(count, common, np.uint16)
    rare = [s for s in range(k) if s != common]
    entries = [struct.unpack_from("<IB", data, at + 5 * i) for i in range(len(rare))]
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=at + 5 * len(rare)))
    for s, (many, parameter) in zip(rare, entries):
        where, used = decode(bits, many, parameter)
        symbols[where] = s
        bits = bits[used:]
    return symbols


def position_encode(symbols: np.ndarray, k: int) -> bytes:
    """Positions of all symbols but the most frequent one, at ceil(log2 n) bits each."""

    def code(where, size):
        width = packing.index_bits(size)
        return width, _pack(where, width)

    return _sparse_encode(symbols, k, code)


def position_decode(data: bytes) -> np.ndarray:
    """The symbols (uint16)."""
    return _sparse_decode(
        data, lambda bits, n, width: (_unpack(bits[: n * width], width), n * width)
    )


def gap_encode(symbols: np.ndarray, k: int) -> bytes:
    """Rice-coded gaps between the positions of each symbol but the most frequent one."""

    def code(where, size):
        gaps = np.diff(where, prepend=-1) - 1
        cost = [int((gaps >> r).sum()) + len(gaps) * (1 + r) for r in range(32)]
        r = int(np.argmin(cost))
        ends = np.cumsum((gaps >> r) + 1)
        unary = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
        unary[ends - 1] = 1
        return r, np.concatenate([unary, _pack(gaps & ((1 << r) - 1), r)])

    return _sparse_encode(symbols, k, code)


def gap_decode(data: bytes) -> np.ndarray:
    """The symbols (uint16)."""

    def decode(bits, count, r):
        ends = np.flatnonzero(bits)[:count]
        start = int(ends[-1]) + 1 if count else 0
        quotients = np.diff(ends, prepend=-1) - 1
        rest = _unpack(bits[start : start + count * r], r) if r else 0
        return np.cumsum((quotients << r) + rest + 1) - 1, start + count * r

    return _sparse_decode(data, decode)


#: encode(symbols, k) -> bytes and decode(bytes) -> symbols of every coder.
CODERS: dict[str, tuple[Callable[[np.ndarray, int], bytes], Callable[[bytes], np.ndarray]]] = {
    "huffman": (huffman_encode, huffman_decode),
    "position": (position_encode, position_decode),
    "gap": (gap_encode, gap_decode),
}


@dataclasses.dataclass(frozen=True)
class FedZip:
    """See `fedzip`."""

    fraction: float
    clusters: int
    iterations: int
    coder: str

    def encode(self, x) -> bytes:
        """The bytes of one layer: coder, codebook, coded symbols."""
        dense = top_k(self.fraction).roundtrip(jnp.asarray(x, jnp.float32).reshape(-1))
        clustering = kmeans(self.clusters, self.iterations)
        payload = clustering.encode(dense)
        symbols = packing.unpack(payload["values"], clustering.bits, dense.shape[0])
        names = list(CODERS) if self.coder == "best" else [self.coder]
        coded = {n: CODERS[n][0](np.asarray(symbols), self.clusters) for n in names}
        best = min(coded, key=lambda name: len(coded[name]))
        head = struct.pack("<BH", list(CODERS).index(best), self.clusters)
        return head + np.asarray(payload["codebook"], np.float32).tobytes() + coded[best]

    def decode(self, data: bytes) -> np.ndarray:
        """The flat float32 vector that the bytes stand for."""
        name, k = struct.unpack_from("<BH", data)
        at = struct.calcsize("<BH")
        codebook = np.frombuffer(data, np.float32, k, at)
        return codebook[list(CODERS.values())[name][1](data[at + 4 * k :])]


def fedzip(
    fraction: float = 0.2, clusters: int = 3, iterations: int = 4, *, coder: str = "best"
) -> FedZip:
    """FedZip's whole pipeline for one layer's update: top-z, k-means, entropy coding.

    Apply it to each layer of an update that leaves the machine once in a while (federated upload,
    a checkpoint of a delta); small layers such as biases are better sent as they are.

    Args:
      fraction: Share of the coordinates kept before clustering; in (0, 1].
      clusters: Centroids, of which one is zero.
      iterations: Lloyd iterations.
      coder: `huffman`, `position`, `gap`, or `best` to take whichever is shortest.

    Returns:
      An object with `encode(array) -> bytes` and `decode(bytes) -> flat float32 array`.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> import numpy as np, jaxcomm.compressors.entropy as entropy
      >>> zipper = entropy.fedzip(0.01)
      >>> update = np.sin(np.arange(10_000.0))
      >>> len(zipper.encode(update)) < 40_000 / 100
      True

    References:
      Malekijoo et al., FedZip, arXiv 2102.01593.
    """
    check_fraction_or_k("fedzip", fraction, None)
    if coder != "best" and coder not in CODERS:
        raise ValueError(f"fedzip: coder must be 'best' or one of {list(CODERS)}, got {coder!r}")
    clustering = kmeans(clusters, iterations)  # checks them
    return FedZip(fraction, clustering.k, clustering.iterations, coder)
