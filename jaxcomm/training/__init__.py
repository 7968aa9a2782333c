"""The step, the loop, checkpoints, metrics."""

from jaxcomm.training.checkpoint import Checkpointer, CheckpointError
from jaxcomm.training.loop import train_loop
from jaxcomm.training.metrics import MetricsLogger
from jaxcomm.training.resize import resize_workers
from jaxcomm.training.step import TrainState, TrainStep, make_train_step

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "MetricsLogger",
    "TrainState",
    "TrainStep",
    "make_train_step",
    "resize_workers",
    "train_loop",
]
