"""Measure the speed of codecs, and of encoding and decoding a real prompt."""
