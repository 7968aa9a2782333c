"""How payloads travel over a named worker axis."""

from jaxcomm.collectives.axis import AxisName, index, size, varying
from jaxcomm.collectives.conditional import cond
from jaxcomm.collectives.cost import choose_exchange, exchange_bytes, exchange_hops
from jaxcomm.collectives.exchange import exchange_mean
from jaxcomm.collectives.flatten import flatten
from jaxcomm.collectives.hierarchical import hierarchical_mean
from jaxcomm.collectives.means import Exchanged, dense_mean, gather_mean, mean, two_phase_mean
from jaxcomm.collectives.primitives import (
    all_gather,
    all_max,
    all_sum,
    all_to_all,
    scatter_sum,
    shift,
)
from jaxcomm.collectives.ring import ring_mean

__all__ = [
    "AxisName",
    "Exchanged",
    "all_gather",
    "all_max",
    "all_sum",
    "all_to_all",
    "choose_exchange",
    "cond",
    "dense_mean",
    "exchange_bytes",
    "exchange_hops",
    "exchange_mean",
    "flatten",
    "gather_mean",
    "hierarchical_mean",
    "index",
    "mean",
    "ring_mean",
    "scatter_sum",
    "shift",
    "size",
    "two_phase_mean",
    "varying",
]
