"""A serializer for LMCache's storage tiers: KV chunks in tiers, without the scores of a running prompt."""
