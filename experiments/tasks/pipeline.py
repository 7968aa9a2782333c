"""Endless, reshuffled, resumable batches through Grain.

The pipeline shuffles and batches *positions*; the examples are gathered a batch at a time:

    position of example j of batch t = permutation(seed, epoch) applied to (t B + j) mod N

Epochs follow each other without a gap, so a batch may hold the end of one and the start of the
next, and every epoch has its own permutation. The state of the iterator is `{'next_index': t}`: the
number of batches it has given. With n processes, process i gathers the i-th contiguous n-th of the
same global batch, so the global sequence does not depend on n.
"""

from collections.abc import Callable

import grain
import numpy as np


def train_iterator(
    num_examples: int,
    fetch: Callable[[np.ndarray], dict[str, np.ndarray]],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """An iterator over this process's part of every global batch.

    Args:
      num_examples: N, the number of examples in an epoch.
      fetch: `fetch(positions) -> dict of arrays` with the example in axis 0.
      batch_size: B, the *global* batch size over all processes.
      seed: an integer in [0, 2**32).
      process_index: which part this process takes.
      process_count: into how many parts a global batch is cut.

    Returns:
      A Grain iterator with `get_state()` (a small JSON-able dict) and `set_state(state)`, which
      goes to that position exactly, in mid-epoch too.

    Raises:
      ValueError: if an argument is out of its range, or if B is not divisible by `process_count`.
    """
    _check(batch_size, seed, process_index, process_count)
    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)
    batches = (
        grain.MapDataset.range(num_examples)
        .shuffle(seed=seed)
        .repeat()
        .batch(batch_size, drop_remainder=True)
        .map(lambda positions: fetch(positions[mine]))
    )
    # Gathering a batch takes under a millisecond: threads that read ahead would only take cores
    # away from the training step (measured slower on two cores), and would have to be stopped.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _check(batch_size: int, seed: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, process_count), got {process_index} of {process_count}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be divisible by process_count, got {batch_size} and {process_count}."
        )
