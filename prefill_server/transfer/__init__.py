"""From layers to messages: plan, pipeline, choice of codec."""
