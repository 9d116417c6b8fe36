"""Tells operators what a service does: metrics, a log line for each request, traces."""
