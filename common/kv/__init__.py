"""Scoring, tiering and coding of a KV cache: pure tensors and bytes, no I/O."""

# Codecs register themselves when they are imported.
from spectrumkv.common.kv import absmax, native

__all__ = ["absmax", "native"]
