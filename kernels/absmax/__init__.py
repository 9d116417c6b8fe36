"""Absmax quantization of keys and values: its layout, a plain reference, CPU loops, Triton kernels."""
