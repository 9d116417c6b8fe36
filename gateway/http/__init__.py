"""Bound what HTTP callers take: connections, headers, bodies, time; and notice callers that go away."""
