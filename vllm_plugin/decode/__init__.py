"""Fetches the KV of prompts in a consuming worker, and writes it into vLLM's pages."""
