"""The service that generates from a received KV cache."""
