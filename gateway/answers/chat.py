"""Write the objects of `/v1/chat/completions`."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from spectrumkv.gateway.answers.tool_calls import ToolCallWriter
from spectrumkv.gateway.answers.writer import AnswerWriter, Token

_ROLE = "assistant"


class ChatWriter(AnswerWriter):
    """Write chat completions."""

    id_prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @cached_property
    def _calls(self) -> ToolCallWriter | None:
        return None if self.options.call_format is None else ToolCallWriter(self.options.call_format)

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return a chunk for each choice that says whose message it is."""
        return [
            self.enveloped(
                self.chunk_kind,
                [{"index": place, "delta": {"role": _ROLE, "content": ""}, "logprobs": None, "finish_reason": None}],
            )
            for place in range(choices)
        ]

    def deltas(self, choice: int, text: str) -> list[dict[str, Any]]:
        """Return the parts of the message that are certain with the text."""
        deltas = [{"content": text}] if self._calls is None else self._calls.deltas(choice, text)
        return [{"delta": one} for one in deltas]

    def last_deltas(self, choice: int) -> list[dict[str, Any]]:
        """Return the parts that might have been a call's and are none."""
        return [] if self._calls is None else [{"delta": one} for one in self._calls.last_deltas(choice)]

    def empty_delta(self) -> dict[str, Any]:
        """Return an empty part."""
        return {"delta": {}}

    def reason(self, choice: int, reason: str) -> str:
        """Return prefill's word, or "tool_calls"."""
        return reason if self._calls is None else self._calls.reason(choice, reason)

    def content(self, text: str, reason: str | None) -> dict[str, Any]:
        """Return the message."""
        said: dict[str, Any] = {"content": text}
        if self._calls is not None:
            said, reason = self._calls.message(text, reason)
        return {"message": {"role": _ROLE, **said, "refusal": None}, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[Token], texts: dict[int, str], start: int) -> dict[str, Any]:
        """Return an entry for each token."""
        return {
            "content": [
                _entry(texts[one.token_id], one.logprob)
                | {"top_logprobs": [_entry(texts[top.token_id], top.logprob) for top in one.top_logprobs]}
                for one in tokens
            ],
            "refusal": None,
        }


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
