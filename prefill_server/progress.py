"""How far requests have come: when each one's tokens left for the client, and how many requests there are."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import current_request


@dataclass
class Progress:
    """Records how far a request came, in seconds of the monotonic clock.

    Attributes:
        arrived_at: when the request reached prefill.
        first_token_at: when the first token had left for the client.
        second_token_at: when the first token that decode generated had left for the client.
        completion_tokens: tokens that left for the client.
        recomputed_prompt_tokens: as decode reports it.
    """

    arrived_at: float
    first_token_at: float | None = None
    second_token_at: float | None = None
    completion_tokens: int = 0
    recomputed_prompt_tokens: int = 0

    def log_fields(self) -> dict[str, int | float]:
        """Return what the request's log line says of the progress."""
        return {
            "completion_tokens": self.completion_tokens,
            "ttft_seconds": self.ttft_seconds,
            "handoff_seconds": self.handoff_seconds,
        }

    @property
    def ttft_seconds(self) -> float:
        """Arrival to first token; 0 before it."""
        return 0.0 if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def handoff_seconds(self) -> float:
        """First token to the first one that decode generated; 0 where there is none."""
        if self.first_token_at is None or self.second_token_at is None:
            return 0.0
        return self.second_token_at - self.first_token_at

    def first_token_left(self, metrics: Metrics) -> None:
        """Take in that the first token of an answer left for the client just now.

        Args:
            metrics: get the time of the first one.
        """
        self.completion_tokens += 1
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
            metrics.time_to_first_token.observe(self.ttft_seconds)

    def token_left(self, metrics: Metrics) -> None:
        """Take in that a token that decode generated left for the client just now.

        Args:
            metrics: get the time of the first one.
        """
        self.completion_tokens += 1
        if self.second_token_at is None:
            now = self.second_token_at = time.monotonic()
            current_request().begin_stage("decode", now)
            metrics.handoff.observe(self.handoff_seconds)


class RequestsInService:
    """Counts the requests that are in the service now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one request for as long as the block runs."""
        with self._lock:
            self.count += 1
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1
