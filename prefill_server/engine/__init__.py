"""Runs the model on prefill: the queue of prompts, forward passes, attention with its hook."""

from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME, KvHook
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.engine.prompt_queue import PromptResult

__all__ = ["ATTENTION_NAME", "KvHook", "PrefillEngine", "PromptResult"]
