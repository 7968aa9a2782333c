"""Handwritten digits: the 1,797 images of 8x8 pixels that come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test set). Pixels are scaled from 0..16 to 0..1.

Split: a permutation of the 1,797 images drawn with seed 0; the first 1,437 of it are for training,
the last 360 for validation.
"""

import numpy as np

from experiments.tasks.base import Data, Task
from experiments.tasks.images import image_data, image_task

NUM_TRAIN = 1437
SPLIT = "RandomState(0).permutation(1797): the first 1437 train, the last 360 validation"


def make_digits(config) -> Task:
    """The task `digits` of a complete `config.task` section.

    Raises:
      ValueError: if a data path is given: these images are built in.
    """
    if config.data_path:
        raise ValueError(
            "config.task.data_path must be '' for the built-in task 'digits', "
            f"got {config.data_path!r}."
        )
    return image_task(config, load_digits())


def load_digits() -> Data:
    """The images, float32 (N, 8, 8, 1) in [0, 1], and their labels, int32 (N,), divided."""
    from sklearn import datasets  # a second to import: only those who ask for digits pay for it

    pixels, classes = datasets.load_digits(return_X_y=True)
    images = (np.reshape(pixels, (-1, 8, 8, 1)) / 16.0).astype(np.float32)
    labels = np.asarray(classes, np.int32)
    # RandomState and not Generator: NumPy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    train, validation = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return image_data(
        (images[train], labels[train]), (images[validation], labels[validation]), SPLIT
    )
