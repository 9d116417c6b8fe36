"""What a caller gets: tokens as they arrive, and the whole completion at the end."""

from dataclasses import asdict, dataclass
from typing import Any

from spectrumkv.client.timings import Timings
from spectrumkv.v1 import generation_pb2, kv_pb2, prefill_pb2

# Keys in JSON of the fields that have another name there.
USAGE_KEYS = {"byte_budget": "budget_counted", "tier_budget": "budget_nominal"}


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Args:
        index: 0, 1, 2, … within the completion.
        token_id: the token.
        text: text that is certain with this token; may be empty.
        logprob: log-probability of the token, where it was asked for.
        top_logprobs: the most likely tokens, where they were asked for.
        arrived_seconds: when it arrived, after the request was sent.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]
    arrived_seconds: float

    @classmethod
    def from_proto(cls, token: generation_pb2.Token, arrived_seconds: float) -> "TokenEvent":
        """Read the message."""
        return cls(
            index=token.index,
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            top_logprobs=tuple(TokenLogprob(one.token_id, one.logprob) for one in token.top_logprobs),
            arrived_seconds=arrived_seconds,
        )


@dataclass(frozen=True)
class TierUsage:
    """What one tier ("fp16", "int8", "int4", "drop", "native") took: prompt tokens and bytes."""

    tier: str
    tokens: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the request used and how long it took by the server's clock; `generation.proto` says each field."""

    prompt_tokens: int
    completion_tokens: int
    tiers: tuple[TierUsage, ...]
    kv_bytes_sent: int
    kv_fp16_bytes: int
    byte_budget: float
    tier_budget: float
    ttft_seconds: float
    handoff_seconds: float
    policy: str
    scorer: str
    codec: str
    recomputed_prompt_tokens: int
    decode_worker: str
    codec_reason: str

    @classmethod
    def from_proto(cls, usage: generation_pb2.Usage) -> "Usage":
        """Read the message."""
        tiers = tuple(TierUsage(tier_label(one.tier), one.tokens, one.bytes) for one in usage.tiers)
        plain = (name for name in cls.__dataclass_fields__ if name != "tiers")
        return cls(tiers=tiers, **{name: getattr(usage, name) for name in plain})

    def as_json(self) -> dict[str, Any]:
        """Return all fields, under the keys that scripts know."""
        return {USAGE_KEYS.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Finished:
    """The end of a completion.

    Args:
        finish_reason: "stop" or "length".
        usage: what the request used.
        arrived_seconds: when it arrived, after the request was sent.
    """

    finish_reason: str
    usage: Usage
    arrived_seconds: float

    @classmethod
    def from_proto(cls, finished: prefill_pb2.GenerateFinished, arrived_seconds: float) -> "Finished":
        """Read the message."""
        reason = generation_pb2.FinishReason.Name(finished.finish_reason)
        return cls(
            finish_reason=reason.removeprefix("FINISH_REASON_").lower(),
            usage=Usage.from_proto(finished.usage),
            arrived_seconds=arrived_seconds,
        )


@dataclass(frozen=True)
class Completion:
    """A finished completion."""

    tokens: tuple[TokenEvent, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens."""
        return tuple(token.token_id for token in self.tokens)

    @property
    def finish_reason(self) -> str:
        """ "stop" or "length"."""
        return self.finished.finish_reason

    @property
    def usage(self) -> Usage:
        """What the request used, by the server's reckoning."""
        return self.finished.usage

    @property
    def timings(self) -> Timings:
        """Latencies by the client's clock."""
        arrivals = [token.arrived_seconds for token in self.tokens]
        return Timings.from_arrivals(arrivals, self.finished.arrived_seconds)

    def as_json(self) -> dict[str, Any]:
        """Return text, tokens, usage and timings; log-probabilities where they were asked for."""
        logprobs = [
            {
                "token_id": token.token_id,
                "logprob": token.logprob,
                "top_logprobs": [asdict(one) for one in token.top_logprobs],
            }
            for token in self.tokens
            if token.logprob is not None
        ]
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": self.usage.as_json(),
            "timings": asdict(self.timings),
        } | ({"logprobs": logprobs} if logprobs else {})


def tier_label(tier: int) -> str:
    """Return a tier's name as tables, JSON and metrics spell it ("int8")."""
    return str(kv_pb2.Tier.Name(tier)).removeprefix("TIER_").lower()
