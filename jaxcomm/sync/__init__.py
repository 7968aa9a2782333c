"""When replicas meet, and how."""

from jaxcomm.sync._periodic import PeriodicState, diloco, local_sgd, periodic
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._schedules import every, post_local, power_rule, qsr, swap, sync_steps
from jaxcomm.sync._streaming import StreamingState, streaming, streaming_diloco

__all__ = [
    "PeriodicState",
    "StreamingState",
    "SyncRule",
    "diloco",
    "every",
    "local_sgd",
    "periodic",
    "post_local",
    "power_rule",
    "qsr",
    "streaming",
    "streaming_diloco",
    "swap",
    "sync_steps",
]
