"""Measures a model once, before it serves: calibration of the basis, the probe, needles in haystacks."""
