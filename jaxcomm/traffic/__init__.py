"""How many bytes a step moves, and how long that takes on a given link.

(Flat names: `jaxcomm.traffic` is the function, this package is `from jaxcomm.traffic import ...`.)
"""

from jaxcomm.collectives.left_dense import LeftDense
from jaxcomm.traffic.advice import Advice, Method, Range, advise
from jaxcomm.traffic.count import count, traffic
from jaxcomm.traffic.ledger import Collective, Traffic
from jaxcomm.traffic.link import Link
from jaxcomm.traffic.prediction import Prediction, predict
from jaxcomm.traffic.table import print_advice, print_traffic

__all__ = [
    "Advice",
    "Collective",
    "LeftDense",
    "Link",
    "Method",
    "Prediction",
    "Range",
    "Traffic",
    "advise",
    "count",
    "predict",
    "print_advice",
    "print_traffic",
    "traffic",
]
