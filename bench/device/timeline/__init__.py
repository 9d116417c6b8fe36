"""Takes the time line of a hand-off: when each layer was computed, coded, handed over, received and in its slots."""
