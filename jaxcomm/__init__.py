"""jaxcomm: the communication layer for data-parallel training in JAX."""

from jaxcomm.compressors import *  # noqa: F403
from jaxcomm.sync import *  # noqa: F403
from jaxcomm.traffic import *  # noqa: F403
from jaxcomm.training import *  # noqa: F403
from jaxcomm.transforms import *  # noqa: F403

__version__ = "0.1.0"
