"""Compressors: what is sent. Pure codecs on flat float32 vectors; they know no axis."""

from jaxcomm.compressors._cast import cast
from jaxcomm.compressors._compose import compose
from jaxcomm.compressors._dct import dct_top_k
from jaxcomm.compressors._fp4 import fp4_e3m0
from jaxcomm.compressors._identity import identity
from jaxcomm.compressors._kmeans import kmeans
from jaxcomm.compressors._learned_levels import learn_levels
from jaxcomm.compressors._natural import natural, natural_dithering
from jaxcomm.compressors._qsgd import qsgd
from jaxcomm.compressors._quantize import quantize
from jaxcomm.compressors._rand_k import rand_k
from jaxcomm.compressors._sign import sign
from jaxcomm.compressors._ternary import ternary
from jaxcomm.compressors._threshold import threshold_top_k
from jaxcomm.compressors._top_k import block_top_k, top_k
from jaxcomm.compressors.base import Compressor, Payload
from jaxcomm.compressors.entropy import fedzip
from jaxcomm.compressors.sparse import Sparsifier

__all__ = [
    "Compressor",
    "Payload",
    "Sparsifier",
    "block_top_k",
    "cast",
    "compose",
    "dct_top_k",
    "fedzip",
    "fp4_e3m0",
    "identity",
    "kmeans",
    "learn_levels",
    "natural",
    "natural_dithering",
    "qsgd",
    "quantize",
    "rand_k",
    "sign",
    "ternary",
    "threshold_top_k",
    "top_k",
]
