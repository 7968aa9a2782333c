"""The step, the loop, checkpoints, metrics."""

from jaxcomm.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
    StorageError,
)
from jaxcomm.training.consistency import DivergenceError, ReplicaCheck
from jaxcomm.training.local_checkpoint import LocalCheckpointer
from jaxcomm.training.loop import train_loop
from jaxcomm.training.make import make_train_step
from jaxcomm.training.memory import keep_memory
from jaxcomm.training.metrics import MetricsLogger
from jaxcomm.training.pacing import pace
from jaxcomm.training.pipeline import PipelinedMean
from jaxcomm.training.resize import resize_workers
from jaxcomm.training.step import TrainState, TrainStep
from jaxcomm.training.straggler_monitor import StragglerMonitor
from jaxcomm.training.stragglers import find_hung, find_slow, localise, robust_scores

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "CorruptCheckpointError",
    "DivergenceError",
    "LocalCheckpointer",
    "MetricsLogger",
    "PipelinedMean",
    "ReplicaCheck",
    "StorageError",
    "StragglerMonitor",
    "TrainState",
    "TrainStep",
    "find_hung",
    "find_slow",
    "keep_memory",
    "localise",
    "make_train_step",
    "pace",
    "resize_workers",
    "robust_scores",
    "train_loop",
]
