"""Probes at deployment how strongly a model's KV may be coded."""
