"""Compressors: what is sent. Pure codecs on flat float32 vectors; they know no axis."""

from jaxcomm.compressors._cast import cast
from jaxcomm.compressors._identity import identity
from jaxcomm.compressors._sign import sign
from jaxcomm.compressors._top_k import block_top_k, top_k
from jaxcomm.compressors.base import Compressor, Payload

__all__ = ["Compressor", "Payload", "block_top_k", "cast", "identity", "sign", "top_k"]
