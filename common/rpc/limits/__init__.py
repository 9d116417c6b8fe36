"""Bounds what callers may take of a server: calls, the time before and between messages, connections."""
