"""Run baselines from elsewhere: quanto, PDTrim, kvpress."""
