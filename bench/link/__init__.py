"""Hand-off against bandwidth over a shaped link."""
