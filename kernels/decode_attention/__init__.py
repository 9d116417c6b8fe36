"""Attention of one decode step over the slots of many requests: CPU loops and Triton kernels."""
