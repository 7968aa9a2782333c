"""When replicas meet, and how."""

from jaxcomm.sync._overlapped import OverlappedState, eager_diloco, overlapped
from jaxcomm.sync._periodic import PeriodicState, diloco, fed_opt, local_sgd, periodic
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._schedules import every, post_local, power_rule, qsr, swap, sync_steps
from jaxcomm.sync._slowmo import SlowMomentumState, co2, relative_gap, slow_momentum, slowmo
from jaxcomm.sync._sparse_loco import sparse_loco
from jaxcomm.sync._streaming import StreamingState, streaming, streaming_diloco

__all__ = [
    "OverlappedState",
    "PeriodicState",
    "SlowMomentumState",
    "StreamingState",
    "SyncRule",
    "co2",
    "diloco",
    "eager_diloco",
    "every",
    "fed_opt",
    "local_sgd",
    "overlapped",
    "periodic",
    "post_local",
    "power_rule",
    "qsr",
    "relative_gap",
    "slow_momentum",
    "slowmo",
    "sparse_loco",
    "streaming",
    "streaming_diloco",
    "swap",
    "sync_steps",
]
