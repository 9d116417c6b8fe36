"""What a request used, put together at its end."""

from dataclasses import dataclass

from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.prefill_server.transfer.pipeline import SentKv
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import generation_pb2


@dataclass
class Progress:
    """How far a request came, in seconds of the monotonic clock.

    Attributes:
        arrived_at: the request reached prefill.
        first_token_at: its first token left for the client.
        second_token_at: its second token came from decode.
        completion_tokens: tokens that left for the client.
        recomputed_prompt_tokens: as decode reports it.
    """

    arrived_at: float
    first_token_at: float | None = None
    second_token_at: float | None = None
    completion_tokens: int = 0
    recomputed_prompt_tokens: int = 0

    def log_fields(self) -> dict[str, int | float]:
        """What the request's log line says of it."""
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
        """First token to second token; 0 where there is no second."""
        if self.first_token_at is None or self.second_token_at is None:
            return 0.0
        return self.second_token_at - self.first_token_at


def usage_message(
    prompt_tokens: int, plan: KvPlan, geometry: KvGeometry, sent: SentKv, progress: Progress, decode_worker: str
) -> generation_pb2.Usage:
    """Return the usage of a finished request."""
    token_layers = sum(sent.tier_tokens.values())
    nominal_cost = sum(tier.nominal_cost * tokens for tier, tokens in sent.tier_tokens.items())
    fp16_bytes = geometry.fp16_bytes(prompt_tokens)
    return generation_pb2.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=progress.completion_tokens,
        tiers=[
            generation_pb2.TierUsage(
                tier=f"TIER_{tier.name}",
                tokens=sent.tier_tokens[tier] / geometry.layers,
                bytes=sent.tier_bytes[tier],
            )
            for tier in Tier
            if sent.tier_tokens[tier]
        ],
        kv_bytes_sent=sent.message_bytes,
        kv_fp16_bytes=fp16_bytes,
        byte_budget=sent.message_bytes / fp16_bytes,
        tier_budget=nominal_cost / token_layers if token_layers else 0.0,
        ttft_seconds=progress.ttft_seconds,
        handoff_seconds=progress.handoff_seconds,
        policy=plan.policy.name,
        scorer=plan.scorer,
        codec=plan.codec.name,
        codec_reason=plan.codec_reason,
        recomputed_prompt_tokens=progress.recomputed_prompt_tokens,
        decode_worker=decode_worker,
    )
