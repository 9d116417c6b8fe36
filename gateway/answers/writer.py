"""Write the objects that both completion routes have in common."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from spectrumkv.client.completion import Answer, Completion, PromptToken, TokenEvent
from spectrumkv.common.tool_calls import ToolCallFormat
from spectrumkv.gateway.answers.token_texts import TokenTexts
from spectrumkv.gateway.answers.usage import usage_of

# A token of the answer or of the prompt.
Token = TokenEvent | PromptToken


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Say what the choices of an answer have.

    Attributes:
        answers: choices for each prompt.
        echo: whether the prompt comes before each answer.
        logprobs: whether log-probabilities do, for the tokens of both.
        prompt_logprobs: whether the prompt's tokens have log-probabilities in a field of their own.
        token_ids: whether there are the ids of the answer's tokens.
        tokens_as_ids: whether log-probabilities name tokens by their ids.
        call_format: how the model writes tool calls; None where it may make none, so that all is text.
    """

    answers: int = 1
    echo: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    call_format: ToolCallFormat | None = None


class AnswerWriter(ABC):
    """Turn tokens and completions into the objects of one route.

    Args:
        request_id: names the answer.
        model: the model that the answer says it is of.
        texts: find the text of single tokens, for log-probabilities.
        authorization: of the caller for whom `texts` asks.
        options: what choices have.
    """

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self, request_id: str, model: str, texts: TokenTexts, authorization: str | None, options: AnswerOptions
    ) -> None:
        self._head = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._texts = texts
        self._authorization = authorization
        self.options = options

    @abstractmethod
    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return the chunks that come before the first token of a stream with so many choices."""

    @abstractmethod
    def deltas(self, choice: int, text: str) -> list[dict[str, Any]]:
        """Return what a choice says of its next text, for a chunk each; nothing where that is not certain yet."""

    @abstractmethod
    def last_deltas(self, choice: int) -> list[dict[str, Any]]:
        """Return what a choice says at its end of the text that was not certain, for a chunk each."""

    @abstractmethod
    def empty_delta(self) -> dict[str, Any]:
        """Return what a choice of a chunk says that has no text."""

    @abstractmethod
    def reason(self, choice: int, reason: str) -> str:
        """Return why a choice of a stream ended, in the API's words; `reason` is prefill's."""

    @abstractmethod
    def content(self, text: str, reason: str | None) -> dict[str, Any]:
        """Return what a choice of a whole answer says of its text, and why the answer ended."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[Token], texts: dict[int, str], start: int) -> dict[str, Any]:
        """Return the log-probabilities of some tokens.

        Args:
            tokens: those of a choice, or the next ones.
            texts: of all tokens that `tokens` names.
            start: where the text of these tokens begins, in characters of the choice's text.
        """

    async def chunks(self, choice: int, tokens: Sequence[Token], start: int) -> list[dict[str, Any]]:
        """Return the chunks of a choice's next tokens: one of the answer, or before it all of the prompt.

        Args:
            choice: the choice that the tokens belong to.
            tokens: at least one.
            start: where their text begins, in characters of the choice's text.
        """
        deltas = self.deltas(choice, "".join(one.text for one in tokens))
        if not deltas and (self.options.logprobs or self.options.token_ids):
            deltas = [self.empty_delta()]
        chunks = [self._chunk(choice, one) for one in deltas]
        if chunks:
            # Pieces of a call do not tell which of the tokens they are of; the first chunk has all.
            chunks[0]["choices"][0] |= {"logprobs": await self._logprobs(tokens, start), **self._ids(tokens)}
        return chunks

    def last_chunks(self, choice: int, reason: str) -> list[dict[str, Any]]:
        """Return the chunks that end a choice."""
        ends = self._chunk(choice, self.empty_delta(), self.reason(choice, reason))
        return [*(self._chunk(choice, one) for one in self.last_deltas(choice)), ends]

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        said = {"index": choice, **delta, "logprobs": None, "finish_reason": reason}
        return self.enveloped(self.chunk_kind, [said])

    def usage_chunk(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the chunk without choices that says what the answer used."""
        return self.enveloped(self.chunk_kind, []) | {"usage": usage_of(completions)}

    async def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the whole answer: for each prompt's completion in order, a choice for each of its answers."""
        answers = [(one, answer) for one in completions for answer in one.answers]
        choices = [await self._choice(place, *one) for place, one in enumerate(answers)]
        return self.enveloped(self.whole_kind, choices) | {"usage": usage_of(completions)}

    async def _choice(self, place: int, completion: Completion, answer: Answer) -> dict[str, Any]:
        echoed: tuple[Token, ...] = completion.prompt_tokens if self.options.echo else ()
        said = {
            "index": place,
            **self.content("".join(one.text for one in echoed) + answer.text, answer.finish_reason),
            "logprobs": await self._logprobs((*echoed, *answer.tokens), 0),
            **self._ids(answer.tokens),
        }
        if self.options.prompt_logprobs:
            said["prompt_logprobs"] = await self._prompt_logprobs(completion.prompt_tokens)
        return said

    def enveloped(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an object with what all objects of the answer have."""
        return {**self._head, "object": kind, "choices": choices}

    async def _logprobs(self, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens; None where the request asked for none."""
        if not self.options.logprobs:
            return None
        if self.options.tokens_as_ids:
            texts = {token_id: f"token_id:{token_id}" for token_id in _ids_in(tokens)}
        else:
            texts = await self._texts.of(_ids_in(tokens), self._authorization)
        return self.logprobs(tokens, texts, start)

    async def _prompt_logprobs(self, tokens: Sequence[PromptToken]) -> list[dict[str, Any] | None]:
        """Return the log-probabilities of the prompt's tokens as vLLM writes them; the first token has none."""
        texts = await self._texts.of(_ids_in(tokens), self._authorization)
        return [None if one.logprob is None else _ranked(one, texts) for one in tokens]

    def _ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"token_ids": [one.token_id for one in tokens]} if self.options.token_ids else {}


def _ids_in(tokens: Sequence[Token]) -> set[int]:
    """Return the ids of tokens and of the likeliest ones in their places."""
    return {token_id for one in tokens for token_id in (one.token_id, *(top.token_id for top in one.top_logprobs))}


def _ranked(token: PromptToken, texts: dict[int, str]) -> dict[str, Any]:
    """Return the likeliest tokens in a place of the prompt by their ids, and the token that stands there."""
    ranked = {
        top.token_id: {"logprob": top.logprob, "rank": place, "decoded_token": texts[top.token_id]}
        for place, top in enumerate(token.top_logprobs, start=1)
    }
    own = {"logprob": token.logprob, "rank": None, "decoded_token": texts[token.token_id]}
    return {str(token_id): said for token_id, said in ({token.token_id: own} | ranked).items()}
