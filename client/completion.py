"""Hold what a caller gets: tokens as they arrive, the whole completion, and what it used."""

from dataclasses import asdict, dataclass
from typing import Any

from spectrumkv.client.kv_map import KvMap
from spectrumkv.client.timings import Timings
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
        index: 0, 1, 2, … within its answer.
        token_id: the token.
        text: the text that this token completes; it may be empty.
        logprob: log-probability of the token; None where the request did not ask for it.
        top_logprobs: the most likely tokens; empty where the request did not ask for them.
        arrived_seconds: when the token arrived, in seconds after the request was sent.
        answer: which of the request's `n` answers the token belongs to, from 0.
        finish_reason: "stop" or "length" for an answer's last token; None for the others.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]
    arrived_seconds: float
    answer: int = 0
    finish_reason: str | None = None

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
            answer=token.answer,
            finish_reason=_reason(token.finish_reason) if token.finish_reason else None,
        )


@dataclass(frozen=True)
class PromptToken:
    """Describe one token of the prompt, where the request asked for `echo` or `prompt_logprobs`.

    Args:
        token_id: the token.
        text: the texts of all tokens together are the prompt's, special tokens included.
        logprob: log-probability of the token after those before it; None where the request did not ask for it, and
            for the first token.
        top_logprobs: the most likely tokens in its place, likewise.
    """

    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]

    @classmethod
    def from_proto(cls, token: prefill_pb2.PromptToken) -> "PromptToken":
        """Return the content of the protobuf message."""
        return cls(
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            top_logprobs=tuple(TokenLogprob(one.token_id, one.logprob) for one in token.top_logprobs),
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
        finish_reason: "stop" or "length"; of answer 0.
        usage: what the request used.
        arrived_seconds: when the end arrived, in seconds after the request was sent.
        kv_map: at what precision the prompt's KV was sent; None where the request did not ask for it.
    """

    finish_reason: str
    usage: Usage
    arrived_seconds: float
    kv_map: KvMap | None = None

    @classmethod
    def from_proto(cls, finished: prefill_pb2.GenerateFinished, arrived_seconds: float) -> "Finished":
        """Return the content of the protobuf message."""
        return cls(
            finish_reason=_reason(finished.finish_reason),
            usage=Usage.from_proto(finished.usage),
            arrived_seconds=arrived_seconds,
            kv_map=KvMap.from_proto(finished.kv_map) if finished.HasField("kv_map") else None,
        )


@dataclass(frozen=True)
class Answer:
    """Hold one of the answers of a completion.

    Args:
        tokens: in their order, at least one.
    """

    tokens: tuple[TokenEvent, ...]

    @property
    def text(self) -> str:
        """Return the whole answer."""
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the ids of the generated tokens."""
        return tuple(token.token_id for token in self.tokens)

    @property
    def finish_reason(self) -> str | None:
        """Return why generation ended: "stop" or "length"."""
        return self.tokens[-1].finish_reason

    def as_json(self) -> dict[str, Any]:
        """Return text and tokens, and log-probabilities where the request asked for them."""
        logprobs = [_logprobs_as_json(token) for token in self.tokens if token.logprob is not None]
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
        } | ({"logprobs": logprobs} if logprobs else {})


@dataclass(frozen=True)
class Completion:
    """Hold a finished completion.

    Args:
        tokens: of all answers, as they arrived.
        finished: the end.
        prompt_tokens: the prompt's, where the request asked for `echo` or `prompt_logprobs`.
    """

    tokens: tuple[TokenEvent, ...]
    finished: Finished
    prompt_tokens: tuple[PromptToken, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Return the answers, of which a request without `n` has one."""
        count = 1 + max((token.answer for token in self.tokens), default=0)
        return tuple(
            Answer(tuple(token for token in self.tokens if token.answer == answer)) for answer in range(count)
        )

    @property
    def text(self) -> str:
        """Return the first answer."""
        return self.answers[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the ids of the first answer's tokens."""
        return self.answers[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Return why the first answer ended: "stop" or "length"."""
        return self.finished.finish_reason

    @property
    def usage(self) -> Usage:
        """Return what the request used, as the server counted it."""
        return self.finished.usage

    @property
    def kv_map(self) -> KvMap | None:
        """Return at what precision the prompt's KV was sent; None where the request did not ask for it."""
        return self.finished.kv_map

    @property
    def timings(self) -> Timings:
        """Return the latencies of the first answer by the client's clock."""
        arrivals = [token.arrived_seconds for token in self.answers[0].tokens]
        return Timings.from_arrivals(arrivals, self.finished.arrived_seconds)

    def as_json(self) -> dict[str, Any]:
        """Return the first answer, usage and timings, and what else the request asked for: prompt, other answers."""
        answers = [answer.as_json() for answer in self.answers]
        prompt = [_logprobs_as_json(token) | {"text": token.text} for token in self.prompt_tokens]
        return (
            answers[0]
            | {"finish_reason": self.finish_reason, "usage": self.usage.as_json(), "timings": asdict(self.timings)}
            | ({"answers": answers} if len(answers) > 1 else {})
            | ({"prompt_tokens": prompt} if prompt else {})
            | ({"kv_map": self.kv_map.as_json()} if self.kv_map is not None else {})
        )


def _logprobs_as_json(token: TokenEvent | PromptToken) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top_logprobs": [asdict(one) for one in token.top_logprobs],
    }


def _reason(reason: generation_pb2.FinishReason) -> str:
    return generation_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def tier_label(tier: int) -> str:
    """Return a tier's name as tables, JSON and metrics spell it ("int8")."""
    return str(kv_pb2.Tier.Name(tier)).removeprefix("TIER_").lower()
