"""Runs work beside the model: threads with a bounded number of cores, prefetching iterators, CUDA streams."""
