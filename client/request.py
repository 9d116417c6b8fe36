"""What a caller asks for: the prompt, how tokens are chosen, and how the KV cache travels."""

import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from spectrumkv.client.argument_types import check_fields, check_type
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import generation_pb2, prefill_pb2

_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1


def _check_unsigned(name: str, value: int | None, maximum: int) -> None:
    if value is not None and not 0 <= value <= maximum:
        raise InvalidArgumentError(f"{name} is {value}; allowed: whole numbers from 0 to {maximum}")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant".

    Raises:
        InvalidArgumentError: one of them is no text that UTF-8 can carry.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TokenIds:
    """A prompt that is tokenized already.

    Raises:
        InvalidArgumentError: an id is no whole number or does not fit into 32 bits.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        check_type("TokenIds.ids", self.ids, tuple[int, ...])
        for token_id in self.ids:
            _check_unsigned("a token id of the prompt", token_id, _MAX_UINT32)


# Text is tokenized as it stands; messages are rendered with the model's own chat template.
Prompt = str | Sequence[Message] | TokenIds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. None takes the server's default; `generation.proto` states meanings and ranges.

    Raises:
        InvalidArgumentError: a value is of another type, or cannot be carried (negative or too large). Ranges are
            the server's to check.
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

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("max_tokens", "top_k", "logprobs"):
            _check_unsigned(name, getattr(self, name), _MAX_UINT32)
        _check_unsigned("seed", self.seed, _MAX_UINT64)
        for token_id in self.stop_token_ids:
            _check_unsigned("stop_token_ids", token_id, _MAX_UINT32)

    def to_proto(self) -> generation_pb2.SamplingParams:
        """Return the message; what is None stays unset."""
        return generation_pb2.SamplingParams(**given(self))


@dataclass(frozen=True, kw_only=True)
class KvChoice:
    """How the KV cache crosses the network. None takes the server's default.

    Raises:
        InvalidArgumentError: a value is of another type. What it may be is the server's to check.
    """

    budget: float | None = None
    policy: str | None = None
    scorer: str | None = None
    codec: str | None = None
    scope: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def to_proto(self) -> prefill_pb2.KvOptions:
        """Return the message; what is None stays unset."""
        return prefill_pb2.KvOptions(**given(self))


def given(choices: Sampling | KvChoice) -> dict[str, Any]:
    """Return the fields that ask for something, by name."""
    values = {one.name: getattr(choices, one.name) for one in fields(choices)}
    return {name: value for name, value in values.items() if _asks(value)}


def _asks(value: object) -> bool:
    """Zero asks for something (greedy, say); None, nothing listed and a switch left alone do not."""
    return bool(value) if isinstance(value, bool | tuple | list) else value is not None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `PrefillService.Generate`.

    Args:
        prompt: text, messages, or token ids.
        sampling: how tokens are chosen.
        kv: how the KV cache travels.
        model: the name that the server must serve under; None takes what there is.
        request_id: named in both services' logs; made up by the server where None.

    Raises:
        InvalidArgumentError: one of these is of another type, or a text that UTF-8 cannot carry.
    """

    prompt: Prompt
    sampling: Sampling = Sampling()
    kv: KvChoice = KvChoice()
    model: str | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        check_fields(self, but=("prompt",))

    def to_proto(self) -> prefill_pb2.GenerateRequest:
        """Return the message."""
        message = prefill_pb2.GenerateRequest(
            request_id=self.request_id or "",
            sampling=self.sampling.to_proto(),
            kv=self.kv.to_proto(),
            model=self.model or "",
        )
        if isinstance(self.prompt, str):
            message.text = self.prompt
        elif isinstance(self.prompt, TokenIds):
            message.token_ids.SetInParent()  # an empty prompt is the server's to refuse
            message.token_ids.ids.extend(self.prompt.ids)
        else:
            message.chat.SetInParent()
            for turn in self.prompt:
                message.chat.messages.add(role=turn.role, content=turn.content)
        return message

    def as_json(self) -> dict[str, Any]:
        """Return what was asked for, without what was left to the server."""
        prompt: dict[str, Any]
        if isinstance(self.prompt, str):
            prompt = {"text": self.prompt}
        elif isinstance(self.prompt, TokenIds):
            prompt = {"token_ids": list(self.prompt.ids)}
        else:
            prompt = {"messages": [asdict(turn) for turn in self.prompt]}
        named = {"model": self.model, "request_id": self.request_id}
        return (
            {"prompt": prompt, "sampling": given(self.sampling), "kv": given(self.kv)}
            | {name: value for name, value in named.items() if value is not None}
        )  # fmt: skip


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
