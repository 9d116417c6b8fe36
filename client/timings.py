"""Compute the latencies of a completion from the times at which its tokens arrived."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Timings:
    """Hold the latencies of one request in milliseconds, by the definitions that serving benchmarks share.

    The clock starts when the client sends the request. A latency is None where the completion has too few
    tokens for it.

    Args:
        ttft_ms: time to first token.
        tpot_ms: time per output token after the first: (E2EL − TTFT) ÷ (n − 1).
        itl_ms: inter-token latencies, the n − 1 gaps between tokens, the hand-off first.
        e2el_ms: end-to-end latency: the time until the whole answer has arrived.
        handoff_ms: hand-off: the time from the first token (prefill's) to the second token (decode's).
    """

    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: tuple[float, ...]
    e2el_ms: float
    handoff_ms: float | None

    @classmethod
    def from_arrivals(cls, arrivals: Sequence[float], ended: float) -> "Timings":
        """Return all latencies, computed from the times at which tokens arrived.

        Args:
            arrivals: when each token arrived, in seconds after the request was sent, ascending.
            ended: when the end of the answer arrived, on the same clock.

        Raises:
            ValueError: the times do not ascend, or one lies before the request.
        """
        moments = [0.0, *arrivals, ended]
        if any(later < earlier for earlier, later in pairwise(moments)):
            raise ValueError(f"arrivals must ascend from 0 to the end; got {moments[1:]}")
        gaps = tuple((later - earlier) * 1000.0 for earlier, later in pairwise(arrivals))
        return cls(
            ttft_ms=arrivals[0] * 1000.0 if arrivals else None,
            tpot_ms=(ended - arrivals[0]) * 1000.0 / len(gaps) if gaps else None,
            itl_ms=gaps,
            e2el_ms=ended * 1000.0,
            handoff_ms=gaps[0] if gaps else None,
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Return the rate of generation after the first token: the inverse of TPOT."""
        return 1000.0 / self.tpot_ms if self.tpot_ms else None
