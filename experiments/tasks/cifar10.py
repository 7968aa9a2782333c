"""CIFAR-10 from its binary files: `data_batch_*.bin` and `test_batch.bin` in one directory.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. A record is one
label byte (0..9) and 3,072 pixel bytes: 32x32 red, then green, then blue, row by row.

Split: the data set's own. All `data_batch_*.bin`, in the order of their names, are for training,
`test_batch.bin` is for validation. Pixels are divided by 255, then each colour is centred and
scaled with the mean and standard deviation of the 50,000 training images.
"""

from pathlib import Path

import numpy as np

from experiments.tasks.base import Data, Task
from experiments.tasks.images import image_data, image_task

RECORD = 1 + 32 * 32 * 3
SPLIT = "data_batch_*.bin train, test_batch.bin validation"
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)


def make_cifar10(config) -> Task:
    """The task `cifar10` of a complete `config.task` section.

    Raises:
      ValueError: if no data path is given, or if a file is empty, of the wrong size or has a label
        above 9.
      FileNotFoundError: if the directory or a file that is looked for does not exist.
    """
    if not config.data_path:
        raise ValueError(
            "config.task.data_path must name the directory with data_batch_*.bin and "
            "test_batch.bin for the task 'cifar10', got ''."
        )
    return image_task(config, load_cifar10(Path(config.data_path)))


def load_cifar10(directory: Path) -> Data:
    """Images as uint8, labels as int32; a batch's images are normalized when it is fetched."""
    if not directory.is_dir():
        raise FileNotFoundError(f"config.task.data_path: there is no directory {directory}.")
    batches = sorted(directory.glob("data_batch_*.bin"))
    if not batches:
        raise FileNotFoundError(f"config.task.data_path: no data_batch_*.bin in {directory}.")
    parts = [_read(path) for path in batches]
    images, labels = (np.concatenate(part) for part in zip(*parts))
    test_images, test_labels = _read(directory / "test_batch.bin")
    data = image_data((images, labels), (normalize(test_images), test_labels), SPLIT)
    return data._replace(fetch=lambda i: {"image": normalize(images[i]), "label": labels[i]})


def normalize(images: np.ndarray) -> np.ndarray:
    """uint8 pixels (..., 3) to float32 with mean 0 and variance 1 over the training set."""
    return (images.astype(np.float32) / 255.0 - MEAN) / STD


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file as images (N, 32, 32, 3) uint8 and labels (N,) int32."""
    if not path.is_file():
        raise FileNotFoundError(f"config.task.data_path: there is no file {path}.")
    size = path.stat().st_size
    if size == 0 or size % RECORD:
        raise ValueError(
            f"{path} must hold one or more records of {RECORD} bytes, but it has {size} bytes."
        )
    records = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise ValueError(f"{path} must have labels from 0 to 9, got {labels.max()}.")
    return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
