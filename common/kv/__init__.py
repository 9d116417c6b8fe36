"""Scoring, tiering and coding of a KV cache: pure tensors and bytes, no I/O."""

# Codecs register themselves when they are imported.
from spectrumkv.common.kv.codecs import absmax, native
from spectrumkv.common.kv.codecs.spectral import codec as spectral_codec

__all__ = ["absmax", "native", "spectral_codec"]
