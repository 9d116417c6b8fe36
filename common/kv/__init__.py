"""Scoring, tiering and coding of a KV cache: pure tensors and bytes, no I/O."""
