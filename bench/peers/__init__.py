"""Baselines from elsewhere: quanto, PDTrim, kvpress."""
