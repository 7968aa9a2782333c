"""What an algorithm does to gradients or pseudo-gradients: Optax transforms."""

from jaxcomm.transforms._accumulate import AccumulateState, accumulate
from jaxcomm.transforms._average import average, compressed_average
from jaxcomm.transforms._deep_gradient_compression import (
    DeepGradientCompressionState,
    deep_gradient_compression,
)
from jaxcomm.transforms._demo import DemoState, demo
from jaxcomm.transforms._econtrol import EControlState, econtrol
from jaxcomm.transforms._ef21 import EF21State, ef21
from jaxcomm.transforms._ef21_plus import EF21PlusState, ef21_plus
from jaxcomm.transforms._error_feedback import ErrorFeedbackState, error_feedback
from jaxcomm.transforms._flattened import flattened
from jaxcomm.transforms._just_one_byte import JustOneByte, JustOneByteState, just_one_byte
from jaxcomm.transforms._lora import LoRA, leaves_named, lora_init, lora_merge, trainable
from jaxcomm.transforms._one_bit_adam import (
    OneBitAdamState,
    one_bit_adam,
    scale_by_one_bit_adam,
)
from jaxcomm.transforms._one_bit_lamb import OneBitLambState, one_bit_lamb
from jaxcomm.transforms._page import PageState, page
from jaxcomm.transforms._power_sgd import PowerSGDState, power_sgd
from jaxcomm.transforms._proximal import proximal_step, soft_threshold
from jaxcomm.transforms._sign_sgd import majority_vote, sign_sgd, signum
from jaxcomm.transforms._step_sizes import (
    contraction_constants,
    econtrol_eta,
    econtrol_step_size,
    ef21_pl_step_size,
    ef21_pp_step_size,
    ef21_rare_features_step_size,
    ef21_sgdm_step_size,
    ef21_step_size,
    ef21_weights,
)
from jaxcomm.transforms._trust_ratio import TrustRatio
from jaxcomm.transforms._zero_one_adam import ZeroOneAdamState, zero_one_adam
from jaxcomm.transforms._zero_one_intervals import local_step_intervals, variance_intervals
from jaxcomm.transforms.common import Communication

__all__ = [
    "AccumulateState",
    "Communication",
    "DeepGradientCompressionState",
    "DemoState",
    "EControlState",
    "EF21PlusState",
    "EF21State",
    "ErrorFeedbackState",
    "JustOneByte",
    "JustOneByteState",
    "LoRA",
    "OneBitAdamState",
    "OneBitLambState",
    "PageState",
    "PowerSGDState",
    "TrustRatio",
    "ZeroOneAdamState",
    "accumulate",
    "average",
    "compressed_average",
    "contraction_constants",
    "deep_gradient_compression",
    "demo",
    "econtrol",
    "econtrol_eta",
    "econtrol_step_size",
    "ef21",
    "ef21_pl_step_size",
    "ef21_plus",
    "ef21_pp_step_size",
    "ef21_rare_features_step_size",
    "ef21_sgdm_step_size",
    "ef21_step_size",
    "ef21_weights",
    "error_feedback",
    "flattened",
    "just_one_byte",
    "leaves_named",
    "local_step_intervals",
    "lora_init",
    "lora_merge",
    "majority_vote",
    "one_bit_adam",
    "one_bit_lamb",
    "page",
    "power_sgd",
    "proximal_step",
    "scale_by_one_bit_adam",
    "sign_sgd",
    "signum",
    "soft_threshold",
    "trainable",
    "variance_intervals",
    "zero_one_adam",
]
