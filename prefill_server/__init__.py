"""The service that reads prompts and sends their KV cache."""
