"""Token sequences: where they come from, how they are divided, cut into windows and counted.

Three sources, chosen by the path:

- `''`: the source text of the Python standard library that runs this program, as bytes (some
  12 MB): every `*.py` under `sysconfig.get_path('stdlib')` in the order of its relative path,
  without directories of tests, installed packages and files that the build machine wrote.
- paths that end in `.bin` (one): a memory-mapped file of little-endian uint16 or uint32 tokens.
- anything else (one path, or several separated by commas): the files' bytes, one after the other.

Split: the tokens are cut into blocks of `split_block` (less where there are fewer than 20 of them);
of every 20 blocks the last is for validation. Windows of `seq_len + 1` tokens start every `seq_len`
tokens and never cross the edge of a block, so no token is in both parts, and each is predicted at
most once an epoch.
"""

import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

PERIOD = 20  # of this many blocks the last one is for validation
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_COUNT_LIMIT = 1 << 24  # tokens from which the unigram distribution is estimated


class Corpus(NamedTuple):
    """Attributes: tokens: (N,) unsigned integers below vocab_size; source: where they are from."""

    tokens: np.ndarray
    vocab_size: int
    source: str


def load_corpus(data_path: str, token_dtype: str, vocab_size: int, max_bytes: int) -> Corpus:
    """The corpus that `data_path` names, cut off after `max_bytes` bytes (0: everything).

    Raises:
      ValueError: for an empty or wrong-size file, or a vocabulary that does not fit the source.
      FileNotFoundError: for a file that does not exist.
    """
    if max_bytes < 0:
        raise ValueError(f"config.task.max_bytes must be at least 0, got {max_bytes}.")
    if data_path.endswith(".bin"):
        if vocab_size < 2:
            raise ValueError(
                "config.task.vocab_size must be given (at least 2) for token files, "
                f"got {vocab_size}."
            )
        tokens = _memory_map(Path(data_path), token_dtype, max_bytes)
        return Corpus(tokens, vocab_size, data_path)
    if vocab_size not in (0, 256):
        raise ValueError(f"config.task.vocab_size must be 0 or 256 for bytes, got {vocab_size}.")
    paths = tuple(Path(p.strip()) for p in data_path.split(",")) if data_path else ()
    text = b"".join(_read(p) for p in paths) if paths else standard_library()
    tokens = np.frombuffer(text, np.uint8)[: max_bytes or None]
    return Corpus(tokens, 256, data_path or "the Python standard library's source text")


@functools.cache
def standard_library() -> bytes:
    """The source text of the standard library, one file after the other."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    # Configuration written when Python was built would differ between machines.
    keep = [
        n
        for n in sorted(found)
        if not _EXCLUDED & set(n.split("/")) and not n.startswith(("_sysconfigdata", "config-"))
    ]
    if not keep:
        raise FileNotFoundError(f"The Python standard library has no *.py files under {root}.")
    return b"".join(found[n].read_bytes() for n in keep)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"config.task.data_path: there is no file {path}.")
    text = path.read_bytes()
    if not text:
        raise ValueError(f"config.task.data_path: {path} is empty.")
    return text


def _memory_map(path: Path, token_dtype: str, max_bytes: int) -> np.ndarray:
    if token_dtype not in ("uint16", "uint32"):
        raise ValueError(
            f"config.task.token_dtype must be 'uint16' or 'uint32', got {token_dtype!r}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"config.task.data_path: there is no file {path}.")
    dtype, size = np.dtype(token_dtype).newbyteorder("<"), path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"{path} must hold one or more {token_dtype} tokens of {dtype.itemsize} bytes, "
            f"but it has {size} bytes."
        )
    tokens = np.memmap(path, dtype, mode="r")
    return tokens[: max_bytes // dtype.itemsize or None]


class Split(NamedTuple):
    """Attributes: train, validation: (n,) int64, where each window starts; block: its length."""

    train: np.ndarray
    validation: np.ndarray
    block: int


def split_windows(num_tokens: int, seq_len: int, split_block: int) -> Split:
    """Divides `num_tokens` tokens as the module says.

    Raises:
      ValueError: if a block would not hold a single window.
    """
    if seq_len < 1:
        raise ValueError(f"config.task.seq_len must be at least 1, got {seq_len}.")
    block = min(split_block, num_tokens // PERIOD)
    if block <= seq_len:
        raise ValueError(
            f"The corpus must have at least {PERIOD} blocks of config.task.seq_len + 1 = "
            f"{seq_len + 1} tokens, but it has {num_tokens} tokens in blocks of {block}."
        )
    starts = np.arange(num_tokens // block)[:, None] * block
    starts = starts + np.arange((block - 1) // seq_len) * seq_len
    is_validation = np.arange(len(starts)) % PERIOD == PERIOD - 1
    return Split(starts[~is_validation].ravel(), starts[is_validation].ravel(), block)


def gather_windows(corpus: Corpus, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """The windows (len(starts), seq_len + 1) as int32.

    Raises:
      ValueError: if a token is outside the vocabulary (an embedding would answer with NaN).
    """
    windows = corpus.tokens[starts[:, None] + np.arange(seq_len + 1)]
    if windows.max() >= corpus.vocab_size:
        raise ValueError(
            f"The tokens of {corpus.source} must be below config.task.vocab_size = "
            f"{corpus.vocab_size}, got {windows.max()}."
        )
    return windows.astype(np.int32)


def unigram_entropy(corpus: Corpus, split: Split, windows: np.ndarray) -> float:
    """Cross entropy, in nats a token, of the windows' targets under the training unigrams.

        H = -mean over targets x of log p(x),   p(x) = (count(x) + 1) / (total + vocab_size)

    It is what a model reaches that knows how often a token occurs and nothing of its context. The
    counts come from the training blocks; of a corpus of more than 2**24 tokens from evenly spaced
    ones that have about so many.
    """
    blocks = np.unique(split.train // split.block)
    blocks = blocks[:: max(1, len(blocks) * split.block // _COUNT_LIMIT)]
    counts = np.ones(corpus.vocab_size)
    for b in blocks:
        part = corpus.tokens[b * split.block : (b + 1) * split.block]
        counts += np.bincount(part, minlength=corpus.vocab_size)[: corpus.vocab_size]
    return float(-np.mean(np.log(counts / counts.sum())[windows[:, 1:]]))


def fingerprint(corpus: Corpus) -> str:
    """The first 12 digits of the SHA-256 of the corpus's first 2**24 tokens."""
    return hashlib.sha256(np.ascontiguousarray(corpus.tokens[:_COUNT_LIMIT]).data).hexdigest()[:12]
