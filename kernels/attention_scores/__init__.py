"""attention_scores."""
