"""Decides in vLLM's scheduler process what workers hand out and fetch: state machines without vLLM and gRPC."""
