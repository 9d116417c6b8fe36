"""Turns layers into messages: a request's plan, its pipeline, and the choice of codec."""

from spectrumkv.prefill_server.transfer.codec_selector import CodecSelector
from spectrumkv.prefill_server.transfer.kv_map import KvMap
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.transfer.sent_kv import SentKv

__all__ = ["CodecSelector", "FirstToken", "KvMap", "KvPipeline", "KvPlan", "SentKv"]
