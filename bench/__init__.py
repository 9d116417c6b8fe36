"""Measure quality and speed, each against baselines in the same run."""
