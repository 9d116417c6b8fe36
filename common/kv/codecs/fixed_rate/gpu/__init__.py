"""Codec fixed_rate where keys and values lie on a GPU: what the host does before and after the kernels."""
