"""Checks the project on a GPU in minutes: kernels, codecs, a hand-off layer by layer, streams."""
