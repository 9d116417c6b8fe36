"""Speed of serving: TTFT, TPOT, ITL, arrivals, start-up."""
