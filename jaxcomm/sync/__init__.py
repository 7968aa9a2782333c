"""When replicas meet, and how."""

from jaxcomm.sync._flasc import flasc
from jaxcomm.sync._merge import MergeState, lo_fi, single_merge
from jaxcomm.sync._overlapped import OverlappedState, eager_diloco, overlapped
from jaxcomm.sync._periodic import PeriodicState, diloco, fed_opt, local_sgd, periodic
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._savic import SavicState, savic
from jaxcomm.sync._scaffold import ScaffoldState, scafcom, scaffold, scallion
from jaxcomm.sync._schedules import every, post_local, power_rule, qsr, swap, sync_steps
from jaxcomm.sync._slowmo import SlowMomentumState, co2, relative_gap, slow_momentum, slowmo
from jaxcomm.sync._sparse_loco import sparse_loco
from jaxcomm.sync._statistics import reestimate
from jaxcomm.sync._streaming import StreamingState, streaming, streaming_diloco
from jaxcomm.sync._weight_average import WeightAverageState, averaged_weights, weight_average

__all__ = [
    "MergeState",
    "OverlappedState",
    "PeriodicState",
    "SavicState",
    "ScaffoldState",
    "SlowMomentumState",
    "StreamingState",
    "SyncRule",
    "WeightAverageState",
    "averaged_weights",
    "co2",
    "diloco",
    "eager_diloco",
    "every",
    "fed_opt",
    "flasc",
    "lo_fi",
    "local_sgd",
    "overlapped",
    "periodic",
    "post_local",
    "power_rule",
    "qsr",
    "reestimate",
    "relative_gap",
    "savic",
    "scafcom",
    "scaffold",
    "scallion",
    "single_merge",
    "slow_momentum",
    "slowmo",
    "sparse_loco",
    "streaming",
    "streaming_diloco",
    "swap",
    "sync_steps",
    "weight_average",
]
