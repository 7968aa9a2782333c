"""When replicas meet, and how."""

from jaxcomm.sync._periodic import PeriodicState, diloco, local_sgd, periodic
from jaxcomm.sync._rule import SyncRule
from jaxcomm.sync._schedules import every, post_local, power_rule, qsr, swap, sync_steps

__all__ = [
    "PeriodicState",
    "SyncRule",
    "diloco",
    "every",
    "local_sgd",
    "periodic",
    "post_local",
    "power_rule",
    "qsr",
    "swap",
    "sync_steps",
]
