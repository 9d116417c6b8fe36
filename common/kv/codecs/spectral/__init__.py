"""Codec "spectral": transform coding of keys and values with a step per token.

Keys and values are turned into coefficients by a basis that a short calibration finds for each model: the
Karhunen-Loève transform in the metric of the model's own sensitivity. A coefficient is a multiple of its token's
step, important tokens have small steps, and the integers go to an entropy coder in streams of equal spread.
"""
