"""The model on prefill: the queue of prompts, passes, attention with its hook."""
