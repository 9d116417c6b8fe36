"""Builds long prompts that hide one fact, and the question for it: the needle in a haystack."""
