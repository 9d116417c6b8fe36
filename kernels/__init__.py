"""Codec kernels: a Triton implementation of each beside its torch reference."""
