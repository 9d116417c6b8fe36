"""Finds, loads and describes models, and keeps what was computed from them."""
