"""Runs a service as a process: options, checks before the start, signals, exit."""
