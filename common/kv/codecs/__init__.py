"""Codecs: keys and values to bytes and back. Each module or folder here registers the codec that it defines."""

from spectrumkv.common.kv.codecs.base import Codec, KvEncoder, SegmentDecoder, codecs, prepare_codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.registry import import_modules

import_modules(__name__, __path__)

__all__ = ["Basis", "Codec", "EncoderRequest", "KvEncoder", "SegmentDecoder", "codecs", "prepare_codecs"]
