"""Start a prefill and a decode service on this machine."""
