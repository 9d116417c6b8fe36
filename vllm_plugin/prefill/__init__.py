"""Hands out the KV of prompts in a producing worker: taps queries, copies pages, codes, keeps, serves."""
