"""The complete `config.task` section of every task, with its default values."""

from typing import Any

import ml_collections

_TYPES = {"dtype": "float32", "param_dtype": "float32"}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "data_path": "",
        "model": {"kind": "conv", "channels": (16, 32), "hidden": 64, **_TYPES},
    },
    "cifar10": {
        "data_path": "",
        "model": {"kind": "conv", "channels": (32, 64, 128, 128), "hidden": 128, **_TYPES},
    },
    "lm": {
        "data_path": "",
        "token_dtype": "uint16",
        "vocab_size": 0,
        "max_bytes": 0,
        "seq_len": 128,
        "split_block": 65_536,
        "validation_windows": 256,
        "model": {"num_layers": 4, "width": 128, "num_heads": 4, "tie": False, **_TYPES},
    },
}

_SMOKE: dict[str, dict[str, Any]] = {
    "digits": {"model": {"channels": (8, 16), "hidden": 32}},
    "cifar10": {"model": {"channels": (8, 16, 16), "hidden": 32}},
    "lm": {
        "seq_len": 64,
        "validation_windows": 128,
        "model": {"num_layers": 2, "width": 64, "num_heads": 2},
    },
}

NAMES = tuple(_DEFAULTS)


def task_config(name: str, size: str = "default") -> ml_collections.ConfigDict:
    """A `config.task` section with every field, for a file in `configs/` to change.

    Args:
      name: 'digits', 'cifar10' or 'lm'.
      size: 'default', or 'smoke' for a model and data that take seconds.

    Raises:
      ValueError: for an unknown name or size.

    Example:
      >>> config = task_config("lm", "smoke")
      >>> config.model.num_layers, config.seq_len
      (2, 64)
    """
    if name not in NAMES:
        raise ValueError(f"config.task.name must be one of {', '.join(NAMES)}, got {name!r}.")
    if size not in ("default", "smoke"):
        raise ValueError(f"size must be 'default' or 'smoke', got {size!r}.")
    section = ml_collections.ConfigDict({"name": name, **_DEFAULTS[name]})
    if size == "smoke":
        section.update(_SMOKE[name])
    return section


def completed(section) -> ml_collections.ConfigDict:
    """`section` with the defaults of its task for the fields that it leaves out.

    Raises:
      ValueError: for an unknown task, an unknown field, or a value of another type.
    """
    full = task_config(str(section.get("name", "")))
    _fill(full, section, "config.task")
    return full


def _fill(full, section, prefix: str) -> None:
    for field in section:
        if field not in full:
            raise ValueError(
                f"{prefix}.{field} is not a field of the task; {prefix} has {', '.join(full)}."
            )
        if isinstance(full[field], ml_collections.ConfigDict):
            _fill(full[field], section[field], f"{prefix}.{field}")
            continue
        try:
            full[field] = section[field]
        except TypeError as error:
            raise ValueError(
                f"{prefix}.{field} must be a {type(full[field]).__name__}, got {section[field]!r}."
            ) from error
