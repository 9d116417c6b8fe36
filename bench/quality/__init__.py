"""Quality of the received KV: perplexity, KL, needles."""
