"""Absmax quantization of keys and values: symmetric INT8 and INT4 with a scale for each token in each KV head.

The quantizer of the SpectrumKV paper (arXiv 2606.08635), with its layout in bytes, a plain reference, CPU loops and
Triton kernels.
"""

from spectrumkv.kernels.absmax.dispatch import (
    decode,
    decode_segments,
    encode,
    encode_ranked,
    encode_tiers,
    halves_are_finite,
    prepare,
)
from spectrumkv.kernels.absmax.layout import FORMATS, INT4, INT8, CodeFormat, body_layout, segment_layout, token_bytes

__all__ = [
    "FORMATS",
    "INT4",
    "INT8",
    "CodeFormat",
    "body_layout",
    "decode",
    "decode_segments",
    "encode",
    "encode_ranked",
    "encode_tiers",
    "halves_are_finite",
    "prepare",
    "segment_layout",
    "token_bytes",
]
