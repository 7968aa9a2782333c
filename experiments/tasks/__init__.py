"""Tasks: a model, its data and its validation set, made from `config.task`.

digits    8x8 images from scikit-learn                        (built in)
lm        a language model on bytes or tokens                 (built in: the standard library)
cifar10   32x32 colour images from the data set's binaries    (with a path)
"""

import ml_collections

from experiments.tasks.base import Task
from experiments.tasks.cifar10 import make_cifar10
from experiments.tasks.defaults import completed, task_config
from experiments.tasks.digits import make_digits
from experiments.tasks.lm import make_lm

__all__ = ["Task", "make_task", "task_config"]

_MAKERS = {"digits": make_digits, "cifar10": make_cifar10, "lm": make_lm}


def make_task(config: ml_collections.ConfigDict) -> Task:
    """The task that the section `config.task` describes.

    Args:
      config: the whole configuration, an `ml_collections.ConfigDict`. `config.task.name` is
        'digits', 'lm' or 'cifar10'; `config.task.data_path` is '' for built-in data, a directory
        (cifar10), a `.bin` file of tokens or one or more text files (lm); the other fields are
        those of `task_config(name)`, and have its values where they are left out.

    Raises:
      ValueError: for an unknown name or field, or a value or file that does not fit.
      FileNotFoundError: for a path that does not exist.

    Example:
      >>> import ml_collections
      >>> task = make_task(ml_collections.ConfigDict({"task": {"name": "digits"}}))
      >>> task.metadata["train_examples"], task.metadata["validation_examples"]
      (1437, 360)
    """
    if "task" not in config:
        raise ValueError(f"config.task must be given, got a configuration with {list(config)}.")
    section = completed(config.task)
    return _MAKERS[str(section.name)](section)
