"""Measure the quality of received KV: perplexity, KL, needles."""
