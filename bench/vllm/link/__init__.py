"""Hand-offs of vLLM pairs over a shaped link."""
