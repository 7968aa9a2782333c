"""What an algorithm does to gradients or pseudo-gradients: Optax transforms."""

from jaxcomm.transforms._average import average, compressed_average
from jaxcomm.transforms._econtrol import EControlState, econtrol
from jaxcomm.transforms._ef21 import EF21State, ef21
from jaxcomm.transforms._error_feedback import ErrorFeedbackState, error_feedback
from jaxcomm.transforms.common import Communication

__all__ = [
    "Communication",
    "EControlState",
    "EF21State",
    "ErrorFeedbackState",
    "average",
    "compressed_average",
    "econtrol",
    "ef21",
    "error_feedback",
]
