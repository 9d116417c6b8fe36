"""Absmax quantization of keys and values: symmetric INT8 and INT4 with a scale for each token in each KV head.

The quantizer of the SpectrumKV paper (arXiv 2606.08635), with its layout in bytes, a plain reference, CPU loops and
Triton kernels.
"""

from spectrumkv.kernels.absmax.dispatch import decode, encode, is_finite, prepare
from spectrumkv.kernels.absmax.layout import (
    FLOAT_SECTIONS,
    FORMATS,
    INT4,
    INT8,
    TIER_16BIT,
    TIER_DROP,
    TIER_INT4,
    TIER_INT8,
    CodeFormat,
    Section,
    sections,
)

__all__ = [
    "FLOAT_SECTIONS",
    "FORMATS",
    "INT4",
    "INT8",
    "TIER_16BIT",
    "TIER_DROP",
    "TIER_INT4",
    "TIER_INT8",
    "CodeFormat",
    "Section",
    "decode",
    "encode",
    "is_finite",
    "prepare",
    "sections",
]
