"""Attention of one decode step: each request's newest query over the slots that hold its keys and values."""

from spectrumkv.kernels.decode_attention.dispatch import decode_attention, prepare

__all__ = ["decode_attention", "prepare"]
