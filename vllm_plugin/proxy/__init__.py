"""Serves vLLM's completions over prefill and decode servers that carry KV with SpectrumKVConnector."""
