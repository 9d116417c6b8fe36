"""Write the objects that both completion routes have in common."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from spectrumkv.client.completion import Completion, TokenEvent, Usage
from spectrumkv.gateway.answers.token_texts import TokenTexts
from spectrumkv.gateway.answers.usage import usage_of


class AnswerWriter(ABC):
    """Turn tokens and completions into the objects of one route.

    Args:
        request_id: names the answer.
        model: the model that the answer says it is of.
        texts: find the text of single tokens, for log-probabilities.
        authorization: of the caller for whom `texts` asks.
        with_token_ids: whether choices have the ids of their tokens.
        tokens_as_ids: whether log-probabilities name tokens by their ids.
    """

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self,
        request_id: str,
        model: str,
        texts: TokenTexts,
        authorization: str | None,
        with_token_ids: bool = False,
        tokens_as_ids: bool = False,
    ) -> None:
        self._head = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._texts = texts
        self._authorization = authorization
        self._with_token_ids = with_token_ids
        self._tokens_as_ids = tokens_as_ids

    @abstractmethod
    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return the chunks that come before the first token of a stream with so many choices."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """Return what a choice of a chunk says of new text."""

    @abstractmethod
    def ending(self) -> dict[str, Any]:
        """Return what the last chunk of a choice says beside the reason."""

    @abstractmethod
    def content(self, text: str) -> dict[str, Any]:
        """Return what a choice of a whole answer says of its text."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenEvent], texts: dict[int, str], start: int) -> dict[str, Any]:
        """Return the log-probabilities of some tokens.

        Args:
            tokens: those of a choice, or the next one.
            texts: of all tokens that `tokens` names.
            start: where the text of these tokens begins, in characters of the choice's text.
        """

    async def chunk(self, choice: int, token: TokenEvent, start: int) -> dict[str, Any]:
        """Return the chunk of one token.

        Args:
            choice: the choice that the token belongs to.
            token: the token.
            start: where its text begins, in characters of the choice's text.
        """
        said = {"index": choice, **self.delta(token.text), "finish_reason": None}
        said |= {"logprobs": await self._logprobs([token], start)}
        return self.enveloped(self.chunk_kind, [said | self._ids([token])])

    def last_chunk(self, choice: int, reason: str) -> dict[str, Any]:
        """Return the chunk that ends a choice."""
        said = {"index": choice, **self.ending(), "logprobs": None, "finish_reason": reason}
        return self.enveloped(self.chunk_kind, [said])

    def usage_chunk(self, used: Sequence[Usage]) -> dict[str, Any]:
        """Return the chunk without choices that says what the answer used."""
        return self.enveloped(self.chunk_kind, []) | {"usage": usage_of(used)}

    async def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the whole answer, a choice for each completion."""
        choices = [
            {
                "index": place,
                **self.content(one.text),
                "logprobs": await self._logprobs(one.tokens, 0),
                "finish_reason": one.finish_reason,
                **self._ids(one.tokens),
            }
            for place, one in enumerate(completions)
        ]
        return self.enveloped(self.whole_kind, choices) | {"usage": usage_of([one.usage for one in completions])}

    def enveloped(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an object with what all objects of the answer have."""
        return {**self._head, "object": kind, "choices": choices}

    async def _logprobs(self, tokens: Sequence[TokenEvent], start: int) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens; None where the request asked for none."""
        if not any(one.logprob is not None for one in tokens):
            return None
        ids = {token_id for one in tokens for token_id in (one.token_id, *(top.token_id for top in one.top_logprobs))}
        if self._tokens_as_ids:
            texts = {token_id: f"token_id:{token_id}" for token_id in ids}
        else:
            texts = await self._texts.of(ids, self._authorization)
        return self.logprobs(tokens, texts, start)

    def _ids(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        return {"token_ids": [one.token_id for one in tokens]} if self._with_token_ids else {}
