"""What the proxy makes of prefill's and decode's answers for the client."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectrumkv.vllm_plugin.proxy.bodies import Body, ClientRequest, PrefillAnswer

PREFIX, END = b"data: ", b"data: [DONE]\n\n"


class EventError(Exception):
    """A server's stream has an error for its next event.

    Args:
        words: the event's JSON.
    """

    def __init__(self, words: bytes) -> None:
        super().__init__(words.decode(errors="replace"))
        self.words = words


@dataclass(frozen=True)
class Continuation:
    """How decode goes on with a request, and what the client gets of that.

    Attributes:
        request: the client's.
        first: prefill's answer.
        appends: whether the first token is prefill's, and the end of the prompt that decode gets; if not, decode
            generates the first token, too.
    """

    request: ClientRequest
    first: PrefillAnswer
    appends: bool

    @classmethod
    def of(cls, request: ClientRequest, first: PrefillAnswer) -> "Continuation":
        """Return how decode goes on after prefill's answer.

        Args:
            request: the client's.
            first: prefill's answer.
        """
        is_known = first.is_whole_text and bool(first.prompt_token_ids)
        return cls(request, first, request.appends_first_token and is_known)

    @property
    def path(self) -> str:
        """Return the path that decode is asked at."""
        return "/v1/completions" if self.appends else self.request.path

    @property
    def body(self) -> Body:
        """Return what decode is asked."""
        return self.request.continuing(self.first) if self.appends else self.request.for_decode(self.first.transfer)

    @property
    def body_without_kv(self) -> Body:
        """Return what decode is asked where the KV did not come: it computes the prompt."""
        return {name: value for name, value in self.body.items() if name != "kv_transfer_params"}

    @property
    def opening(self) -> list[Body]:
        """Return what a stream begins with before decode's answer."""
        return first_chunks(self.request, self.first) if self.appends else []

    def joined(self, rest: Body) -> Body:
        """Return the whole answer.

        Args:
            rest: decode's answer.
        """
        return joined(self.request, self.first, rest) if self.appends else rest

    def line(self, line: bytes) -> bytes:
        """Return a line of decode's stream as the client gets it.

        Args:
            line: with its end.

        Returns:
            A line.

        Raises:
            EventError: the line says that decode failed.
        """
        data = line.removeprefix(PREFIX)
        if data == line or line.strip() == END.strip():
            return line
        chunk = json.loads(data)
        if "error" in chunk:
            raise EventError(data.strip())
        return event(next_chunk(self.request, self.first, chunk)) if self.appends else line


def event(chunk: Mapping[str, Any]) -> bytes:
    """Return the line of a server-sent event; an empty line ends the event.

    Args:
        chunk: the event's data.
    """
    return PREFIX + json.dumps(chunk).encode() + b"\n"


def joined(request: ClientRequest, first: PrefillAnswer, rest: Body) -> Body:
    """Return the answer to a request of which decode generated all but the first token.

    Args:
        request: the client's.
        first: prefill's.
        rest: decode's answer.
    """
    choice = dict(rest["choices"][0])
    text = first.text + choice.pop("text")
    usage = dict(rest.get("usage") or {})
    if usage:
        usage |= {"prompt_tokens": usage["prompt_tokens"] - 1, "completion_tokens": usage["completion_tokens"] + 1}
    mine = first.answer["choices"][0].get("logprobs")
    if mine and choice.get("logprobs"):
        theirs = choice["logprobs"]
        choice["logprobs"] = {name: (mine.get(name) or []) + (theirs.get(name) or []) for name in theirs}
    for name in ("prompt_token_ids", "token_ids", "prompt_logprobs"):
        choice.pop(name, None)
    told = {"id": first.answer["id"], "created": first.answer["created"], "usage": usage}
    if request.is_chat:
        choice |= {"message": {"role": "assistant", "content": text}, "logprobs": None}
        return rest | told | {"object": "chat.completion", "choices": [choice]}
    return rest | told | {"choices": [choice | {"text": text}]}


def first_chunks(request: ClientRequest, first: PrefillAnswer) -> list[Body]:
    """Return what a stream begins with: the first token, and in a chat the role before it.

    Args:
        request: the client's.
        first: prefill's.
    """
    if request.is_chat:
        return [
            _chunk(request, first, {"delta": {"role": "assistant", "content": ""}}),
            _chunk(request, first, {"delta": {"content": first.text}}),
        ]
    logprobs = first.answer["choices"][0].get("logprobs")
    return [_chunk(request, first, {"text": first.text} | ({"logprobs": logprobs} if logprobs else {}))]


def next_chunk(request: ClientRequest, first: PrefillAnswer, chunk: Body) -> Body:
    """Return a chunk of decode's stream as the client gets it.

    Args:
        request: the client's.
        first: prefill's.
        chunk: decode's.
    """
    choices = []
    for choice in chunk.get("choices", []):
        kept = {name: value for name, value in choice.items() if name not in ("token_ids", "prompt_token_ids")}
        if request.is_chat:
            kept["delta"] = {"content": kept.pop("text", "")}
        choices.append(kept)
    usage = chunk.get("usage")
    if usage:
        usage = usage | {
            "prompt_tokens": usage["prompt_tokens"] - 1,
            "completion_tokens": usage["completion_tokens"] + 1,
        }
    made = _chunk(request, first, {}) | {"choices": choices}
    return made | ({"usage": usage} if usage else {})


def _chunk(request: ClientRequest, first: PrefillAnswer, choice: Body) -> Body:
    return {
        "id": first.answer["id"],
        "object": "chat.completion.chunk" if request.is_chat else "text_completion",
        "created": first.answer.get("created", int(time.time())),
        "model": first.answer["model"],
        "choices": [{"index": 0, "finish_reason": None} | choice],
    }


def without_internals(answer: Mapping[str, Any]) -> Body:
    """Return prefill's answer without what only the proxy asked for.

    Args:
        answer: prefill's JSON.
    """
    hidden = ("prompt_token_ids", "token_ids")
    choices = [{name: value for name, value in one.items() if name not in hidden} for one in answer["choices"]]
    kept = {name: value for name, value in answer.items() if name not in ("kv_transfer_params", "prompt_token_ids")}
    return kept | {"choices": choices}
