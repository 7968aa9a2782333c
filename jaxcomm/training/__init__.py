"""The step, the loop, checkpoints, metrics."""

from jaxcomm.training.step import TrainState, TrainStep, make_train_step

__all__ = ["TrainState", "TrainStep", "make_train_step"]
