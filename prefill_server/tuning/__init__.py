"""What is measured once for a model: calibration, probe, needles."""
