"""Threads, iterators that run ahead, CUDA streams."""
