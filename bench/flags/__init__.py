"""Command-line flags that benches share."""
