"""What left for decode of one request, and the time that it took."""

from dataclasses import dataclass, field

from spectrumkv.common.kv.tiers import Tier


@dataclass
class SentKv:
    """Counts what left for decode so far, and the time that it took.

    Attributes:
        message_bytes: bytes of all serialized messages: Begin, chunks, End.
        tier_bytes: bytes of codes and scales by tier.
        tier_tokens: token-layers by tier.
        encode_seconds: time spent on scoring, tiering and encoding.
        coder_seconds: the coder's own share of that; see `CodingClock`.
        link_seconds: time that gRPC took over messages before it asked for the next.
        coded_ahead: whether the next messages were made meanwhile.
        first_chunk_at: monotonic time of the first chunk; None before it.
        ended_at: monotonic time of End; None before it.
    """

    message_bytes: int = 0
    tier_bytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    tier_tokens: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    encode_seconds: float = 0.0
    coder_seconds: float = 0.0
    link_seconds: float = 0.0
    coded_ahead: bool = False
    first_chunk_at: float | None = None
    ended_at: float | None = None

    @property
    def transfer_seconds(self) -> float:
        """First chunk to End; 0 where there was no chunk or no End."""
        if self.first_chunk_at is None or self.ended_at is None:
            return 0.0
        return self.ended_at - self.first_chunk_at

    def log_fields(self) -> dict[str, int | float]:
        """Return what the request's log line says of the transfer."""
        return {
            "kv_bytes": self.message_bytes,
            "encode_seconds": self.encode_seconds,
            "transfer_seconds": self.transfer_seconds,
        }
