"""Reads GGUF files, and makes model directories of them."""
