"""How many bytes a step moves, and how long that takes on a given link."""

from jaxcomm.traffic.count import Collective, Traffic, count, traffic

__all__ = ["Collective", "Traffic", "count", "traffic"]
