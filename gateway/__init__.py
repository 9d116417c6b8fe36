"""Serve the OpenAI API over HTTP, in front of prefill services; the gateway holds no model."""
