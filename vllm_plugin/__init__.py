"""Puts SpectrumKV's transfer into vLLM: exact prefill and decode by vLLM, KV between them at a byte budget."""
