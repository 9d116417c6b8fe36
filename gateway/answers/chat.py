"""Write the objects of `/v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any

from spectrumkv.gateway.answers.writer import AnswerWriter, Token

_ROLE = "assistant"


class ChatWriter(AnswerWriter):
    """Write chat completions."""

    id_prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return a chunk for each choice that says whose message it is."""
        return [
            self.enveloped(
                self.chunk_kind,
                [{"index": place, "delta": {"role": _ROLE, "content": ""}, "logprobs": None, "finish_reason": None}],
            )
            for place in range(choices)
        ]

    def delta(self, text: str) -> dict[str, Any]:
        """Return the text as a part of the message."""
        return {"delta": {"content": text}}

    def ending(self) -> dict[str, Any]:
        """Return an empty part."""
        return {"delta": {}}

    def content(self, text: str) -> dict[str, Any]:
        """Return the message."""
        return {"message": {"role": _ROLE, "content": text, "refusal": None}}

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
