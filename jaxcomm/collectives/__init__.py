"""How payloads travel over a named worker axis."""

from jaxcomm.collectives.axis import AxisName, index, size, varying
from jaxcomm.collectives.conditional import cond
from jaxcomm.collectives.flatten import flatten
from jaxcomm.collectives.means import Exchanged, dense_mean, gather_mean, mean, two_phase_mean
from jaxcomm.collectives.primitives import all_gather, all_max, all_sum, all_to_all, shift

__all__ = [
    "AxisName",
    "Exchanged",
    "all_gather",
    "all_max",
    "all_sum",
    "all_to_all",
    "cond",
    "dense_mean",
    "flatten",
    "gather_mean",
    "index",
    "mean",
    "shift",
    "size",
    "two_phase_mean",
    "varying",
]
