"""Connections and calls that say nothing, in thousands, on real services."""
