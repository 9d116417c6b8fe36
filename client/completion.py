"""Hold what a caller gets: tokens as they arrive, the whole completion, and how long it took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from spectrumkv.v1 import generation_pb2, kv_pb2, prefill_pb2


@dataclass(frozen=True)
class TokenLogprob:
    """Hold a token and its log-probability under the model, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenEvent:
    """Describe one generated token.

    Args:
        index: 0, 1, 2, … within the completion.
        token_id: the token.
        text: the text that this token completes; it may be empty.
        logprob: log-probability of the token; None where the request did not ask for it.
        top_logprobs: the most likely tokens; empty where the request did not ask for them.
        arrived_seconds: when the token arrived, in seconds after the request was sent.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]
    arrived_seconds: float

    @classmethod
    def from_proto(cls, token: generation_pb2.Token, arrived_seconds: float) -> "TokenEvent":
        """Return the content of the protobuf message."""
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
    """Count the prompt tokens and the bytes of one tier ("fp16", "int8", "int4", "drop", "native")."""

    tier: str
    tokens: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Count what the request used, by the server's clock; `generation.proto` documents each field."""

    prompt_tokens: int
    completion_tokens: int
    tiers: tuple[TierUsage, ...]
    kv_bytes_sent: int
    kv_fp16_bytes: int
    budget_counted: float
    budget_nominal: float
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
        """Return the content of the protobuf message."""
        tiers = tuple(TierUsage(tier_label(one.tier), one.tokens, one.bytes) for one in usage.tiers)
        plain = (name for name in cls.__dataclass_fields__ if name != "tiers")
        return cls(tiers=tiers, **{name: getattr(usage, name) for name in plain})

    def as_json(self) -> dict[str, Any]:
        """Return all fields; their names are the keys that scripts know."""
        return asdict(self)


@dataclass(frozen=True)
class Finished:
    """Describe the end of a completion.

    Args:
        finish_reason: "stop" or "length".
        usage: what the request used.
        arrived_seconds: when the end arrived, in seconds after the request was sent.
    """

    finish_reason: str
    usage: Usage
    arrived_seconds: float

    @classmethod
    def from_proto(cls, finished: prefill_pb2.GenerateFinished, arrived_seconds: float) -> "Finished":
        """Return the content of the protobuf message."""
        reason = generation_pb2.FinishReason.Name(finished.finish_reason)
        return cls(
            finish_reason=reason.removeprefix("FINISH_REASON_").lower(),
            usage=Usage.from_proto(finished.usage),
            arrived_seconds=arrived_seconds,
        )


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


@dataclass(frozen=True)
class Completion:
    """Hold a finished completion."""

    tokens: tuple[TokenEvent, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """Return the whole answer."""
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the ids of the generated tokens."""
        return tuple(token.token_id for token in self.tokens)

    @property
    def finish_reason(self) -> str:
        """Return why generation ended: "stop" or "length"."""
        return self.finished.finish_reason

    @property
    def usage(self) -> Usage:
        """Return what the request used, as the server counted it."""
        return self.finished.usage

    @property
    def timings(self) -> Timings:
        """Return the latencies by the client's clock."""
        arrivals = [token.arrived_seconds for token in self.tokens]
        return Timings.from_arrivals(arrivals, self.finished.arrived_seconds)

    def as_json(self) -> dict[str, Any]:
        """Return text, tokens, usage and timings, and log-probabilities where the request asked for them."""
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
