"""Measure the speed of serving: TTFT, TPOT, ITL, arrivals, start-up."""
