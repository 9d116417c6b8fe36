"""Write the objects of `/v1/completions`."""

from collections.abc import Sequence
from typing import Any

from spectrumkv.gateway.answers.writer import AnswerWriter, Token


class CompletionWriter(AnswerWriter):
    """Write text completions."""

    id_prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return nothing: the first token is the first chunk."""
        return []

    def deltas(self, choice: int, text: str) -> list[dict[str, Any]]:
        """Return the text itself."""
        return [{"text": text}]

    def last_deltas(self, choice: int) -> list[dict[str, Any]]:
        """Return nothing: all text was said."""
        return []

    def empty_delta(self) -> dict[str, Any]:
        """Return no text."""
        return {"text": ""}

    def reason(self, choice: int, reason: str) -> str:
        """Return prefill's word, which is the API's."""
        return reason

    def content(self, text: str, reason: str | None) -> dict[str, Any]:
        """Return the text itself."""
        return {"text": text, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[Token], texts: dict[int, str], start: int) -> dict[str, Any]:
        """Return four lists with an entry for each token."""
        offsets, at = [], start
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [texts[one.token_id] for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [_likeliest(one, texts) for one in tokens],
            "text_offset": offsets,
        }


def _likeliest(token: Token, texts: dict[int, str]) -> dict[str, float] | None:
    """Return the likeliest tokens in a place; None for the first token of a prompt, which nothing comes before."""
    return None if token.logprob is None else {texts[top.token_id]: top.logprob for top in token.top_logprobs}
