"""Measure hand-offs against bandwidth over a shaped link."""
