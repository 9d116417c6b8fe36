"""Describe what a caller asks for: the prompt, how tokens are sampled, and how the KV cache is sent."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from spectrumkv.client.argument_types import check_fields, check_type
from spectrumkv.client.kv_map import DETAILS
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.client.tools import ToolCall, Tools
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import generation_pb2, prefill_pb2

_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1


def _check_unsigned(name: str, value: int | None, maximum: int) -> None:
    if value is not None and not 0 <= value <= maximum:
        raise InvalidArgumentError(f"{name} is {value}; allowed: whole numbers from 0 to {maximum}")


@dataclass(frozen=True)
class Message:
    """Hold one turn of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: the text.
        tool_calls: the calls that an assistant's message made.
        tool_call_id: in a tool's message: which call it answers.

    Raises:
        InvalidArgumentError: a value has another type, or is a text that UTF-8 cannot encode.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def to_proto(self) -> prefill_pb2.ChatMessage:
        """Return the protobuf message."""
        return prefill_pb2.ChatMessage(
            role=self.role,
            content=self.content,
            tool_calls=[call.to_proto() for call in self.tool_calls],
            tool_call_id=self.tool_call_id or "",
        )


@dataclass(frozen=True)
class TokenIds:
    """Hold a prompt that is tokenized already.

    Raises:
        InvalidArgumentError: an id is not a whole number, or does not fit into 32 bits.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        check_type("TokenIds.ids", self.ids, tuple[int, ...])
        for token_id in self.ids:
            _check_unsigned("a token id of the prompt", token_id, _MAX_UINT32)


# The server tokenizes a text as it is, and renders messages with the model's own chat template.
Prompt = str | Sequence[Message] | TokenIds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Say how tokens are sampled. None takes the server's default; `generation.proto` documents fields and ranges.

    Raises:
        InvalidArgumentError: a value has another type, or does not fit the message (negative or too large). The
            server checks the ranges.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int | None = None
    bad_words: tuple[str, ...] = ()
    n: int | None = None
    structured_output: StructuredOutput | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("max_tokens", "top_k", "logprobs", "min_tokens", "n"):
            _check_unsigned(name, getattr(self, name), _MAX_UINT32)
        _check_unsigned("seed", self.seed, _MAX_UINT64)
        for name in ("stop_token_ids", "logit_bias"):
            for token_id in getattr(self, name):
                _check_unsigned(name, token_id, _MAX_UINT32)

    def to_proto(self) -> generation_pb2.SamplingParams:
        """Return the protobuf message; a field that is None stays unset."""
        values = given(self)
        if self.structured_output is not None:
            values["structured_output"] = self.structured_output.to_proto()
        return generation_pb2.SamplingParams(**values)


@dataclass(frozen=True, kw_only=True)
class KvChoice:
    """Say how the KV cache is sent from prefill to decode. None takes the server's default.

    Raises:
        InvalidArgumentError: a value has another type. The server checks which values it allows.
    """

    budget: float | None = None
    policy: str | None = None
    scorer: str | None = None
    codec: str | None = None
    scope: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def to_proto(self) -> prefill_pb2.KvOptions:
        """Return the protobuf message; a field that is None stays unset."""
        return prefill_pb2.KvOptions(**given(self))


def given(choices: Sampling | KvChoice | StructuredOutput) -> dict[str, Any]:
    """Return the fields that are set, by name."""
    values = {one.name: getattr(choices, one.name) for one in fields(choices)}
    return {name: value for name, value in values.items() if _is_set(value)}


def _is_set(value: object) -> bool:
    """Return whether a value is set: zero is (temperature 0 is greedy); None, False and an empty list are not."""
    return bool(value) if isinstance(value, bool | tuple | list | Mapping) else value is not None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Describe one call of `PrefillService.Generate`.

    Args:
        prompt: text, messages, or token ids.
        sampling: how tokens are sampled.
        kv: how the KV cache is sent.
        model: the name of the model that the server must serve; None accepts any.
        request_id: identifies the request in both services' logs; None lets the server draw one.
        tools: the functions that the model may call; they need a prompt of messages.
        echo: whether the prompt's tokens come back before the answer.
        prompt_logprobs: how many likeliest tokens to report at each of the prompt's tokens, beside the
            log-probability of the token itself; None is neither.
        kv_map: "tokens" reports at what precision the KV of each of the prompt's tokens was sent, "layers" also in
            which layer; None reports neither.

    Raises:
        InvalidArgumentError: an argument has another type, or is a text that UTF-8 cannot encode, tools come with
            another prompt than messages, or there is no such map.
    """

    prompt: Prompt
    sampling: Sampling = Sampling()
    kv: KvChoice = KvChoice()
    model: str | None = None
    request_id: str | None = None
    tools: Tools = Tools()  # noqa: RUF009  # frozen
    echo: bool = False
    prompt_logprobs: int | None = None
    kv_map: str | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        check_fields(self, but=("prompt",))
        _check_unsigned("prompt_logprobs", self.prompt_logprobs, _MAX_UINT32)
        if self.kv_map is not None and self.kv_map not in DETAILS:
            raise InvalidArgumentError(f"kv_map is {self.kv_map!r}; allowed: {', '.join(map(repr, DETAILS))}")
        if self.tools.tools and isinstance(self.prompt, str | TokenIds):
            raise InvalidArgumentError("tools need a conversation; give the prompt as a list of Message")

    def to_proto(self) -> prefill_pb2.GenerateRequest:
        """Return the protobuf message."""
        message = prefill_pb2.GenerateRequest(
            request_id=self.request_id or "",
            sampling=self.sampling.to_proto(),
            kv=self.kv.to_proto(),
            model=self.model or "",
            echo=self.echo,
            prompt_logprobs=self.prompt_logprobs,
            kv_map=DETAILS[self.kv_map] if self.kv_map is not None else prefill_pb2.KV_MAP_DETAIL_UNSPECIFIED,
        )
        if isinstance(self.prompt, str):
            message.text = self.prompt
        elif isinstance(self.prompt, TokenIds):
            message.token_ids.SetInParent()  # the server refuses an empty prompt
            message.token_ids.ids.extend(self.prompt.ids)
        else:
            message.chat.SetInParent()
            message.chat.messages.extend(turn.to_proto() for turn in self.prompt)
            self.tools.put_into(message.chat)
        return message

    def as_json(self) -> dict[str, Any]:
        """Return the request, without the fields that are left to the server."""
        prompt: dict[str, Any]
        if isinstance(self.prompt, str):
            prompt = {"text": self.prompt}
        elif isinstance(self.prompt, TokenIds):
            prompt = {"token_ids": list(self.prompt.ids)}
        else:
            prompt = {"messages": [_compact(turn) for turn in self.prompt]}
        named = {
            "model": self.model,
            "request_id": self.request_id,
            "tools": _compact(self.tools) if self.tools.tools else None,
            "echo": self.echo or None,
            "prompt_logprobs": self.prompt_logprobs,
            "kv_map": self.kv_map,
        }
        sampling = {
            name: given(value) if isinstance(value, StructuredOutput) else value
            for name, value in given(self.sampling).items()
        }
        return (
            {"prompt": prompt, "sampling": sampling, "kv": given(self.kv)}
            | {name: value for name, value in named.items() if value is not None}
        )  # fmt: skip


def _compact(one: Message | Tools) -> dict[str, Any]:
    """Return the fields of a dataclass that are set, and those of dataclasses in it."""
    return {name: value for name, value in asdict(one).items() if _is_set(value)}


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, str):
        check_type("the prompt", prompt, str)
        return
    is_chat = (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, bytes)
        and all(isinstance(turn, Message) for turn in prompt)
    )
    if not is_chat and not isinstance(prompt, TokenIds):
        raise InvalidArgumentError(
            f"the prompt is {reprlib.repr(prompt)}; allowed: a text, token ids as TokenIds((1, 2, 3)), or a "
            'conversation as [Message("user", "Hello")]'
        )
