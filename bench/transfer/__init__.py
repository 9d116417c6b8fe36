"""Measure the speed of a transfer between two processes, beside raw TCP and raw gRPC."""
