"""Needle in a haystack: long prompts that hide one fact, and the question for it."""
