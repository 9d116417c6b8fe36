"""What operators see: metrics, request log lines, traces."""
