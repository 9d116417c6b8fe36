"""Turns a prompt into token ids, chooses the next tokens, and turns these into text."""
