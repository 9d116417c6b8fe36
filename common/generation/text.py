"""Turns the chosen tokens into the text that a client sees, and tells when generation ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from transformers import PreTrainedTokenizerFast

from spectrumkv.common.generation.detokenizer import Detokenizer
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import SampledToken
from spectrumkv.common.generation.vocabulary import ending_token_ids
from spectrumkv.v1 import generation_pb2


class FinishReason(Enum):
    """The reason why generation ended; the values are those of the protocol's `FinishReason`."""

    STOP = generation_pb2.FINISH_REASON_STOP
    LENGTH = generation_pb2.FINISH_REASON_LENGTH

    def to_proto(self) -> generation_pb2.FinishReason:
        """Return the protocol's value for this reason."""
        return self.value

    @classmethod
    def from_proto(cls, value: generation_pb2.FinishReason) -> "FinishReason":
        """Return the reason for a value of the protocol.

        Raises:
            ValueError: the value is unspecified or unknown.
        """
        return cls(value)


@dataclass(frozen=True)
class TextDelta:
    """The text that one token adds.

    Attributes:
        text: the text, which may be empty and never splits a character.
        finish: set if this token is the last one; `text` then ends with everything that was held back.
    """

    text: str
    finish: FinishReason | None = None


class StopStrings:
    """Passes text on until a stop string is complete in it.

    The result does not depend on how the text is cut into pieces. The stop string that is complete first counts, as
    if each piece were one character; of two that end at the same character the longer one counts.

    Args:
        stop: strings of at least one character.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Args:
            text: the piece.

        Returns:
            The text that can no longer be part of a stop string, and whether a stop string was found. Text that may
            be the start of a stop string is held back. Once a stop string is found, the text ends before it.
        """
        self._held += text
        found = [(at + len(one), at) for one in self._stop if (at := self._held.find(one)) >= 0]
        if found:
            _, start = min(found)
            before, self._held = self._held[:start], ""
            return before, True
        kept = self._undecided()
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain, False

    def flush(self) -> str:
        """Return the text that is held back, since no more text comes to complete a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self) -> int:
        """Return the length of the longest end of the held text that a stop string starts with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-length:]) for one in self._stop):
                return length
        return 0


class TextStream:
    """Turns the tokens of one request into text, token by token.

    A stream that gets the same tokens returns the same deltas, so decode replays the token that prefill sampled. All
    deltas together are the decoded tokens (see `Detokenizer`) up to the first stop string, which is looked for in the
    text after the first `min_tokens` tokens. A token that ends
    generation has no text itself, whether it is special or not. If the last token leaves a character incomplete, the
    text ends with U+FFFD, as in `tokenizer.decode`. Special tokens have no text, so a stop string that is one of them
    ends generation at that token.

    Args:
        tokenizer: the model's tokenizer.
        params: the sampling parameters, of which max_tokens, min_tokens and what ends the generation are read.
        eos_token_ids: the model's end-of-sequence tokens.
        prompt_token_ids: what the text continues; nothing where it is a text of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self._stop_strings = StopStrings(params.stop)
        self._last_token_ids = ending_token_ids(tokenizer, eos_token_ids, params)
        self._tokens_left = params.max_tokens
        self._unstoppable = params.min_tokens
        self._ended = False

    def push(self, token_id: int) -> TextDelta:
        """Take the next token.

        A token that completes a stop string or is a stop token gives STOP even if it is the last one that max_tokens
        allows.

        Args:
            token_id: the token.

        Returns:
            The text that this token adds, and the reason if generation ends with it.

        Raises:
            InternalError: the tokenizer cannot decode tokens one by one.
            ValueError: generation has ended before this token.
        """
        if self._ended:
            raise ValueError(f"token {token_id} comes after the last one")
        self._tokens_left -= 1
        self._unstoppable -= 1
        if token_id in self._last_token_ids:
            rest, _ = self._release()
            return TextDelta(rest, FinishReason.STOP)
        text, stopped = self._detokenizer.push(token_id), False
        if self._unstoppable < 0:
            text, stopped = self._stop_strings.push(text)
        if stopped:
            self._ended = True
            return TextDelta(text, FinishReason.STOP)
        if self._tokens_left == 0:
            rest, stopped = self._release()
            return TextDelta(text + rest, FinishReason.STOP if stopped else FinishReason.LENGTH)
        return TextDelta(text)

    def flush(self) -> str:
        """Return the text that is held back when generation is ended from outside; "" after a last token.

        Raises:
            InternalError: the tokenizer cannot decode tokens one by one.
        """
        if self._ended:
            return ""
        return self._release()[0]

    def _release(self) -> tuple[str, bool]:
        """Return the text that was held back, and whether a stop string was in it; no more tokens may follow."""
        self._ended = True
        text, stopped = self._stop_strings.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._stop_strings.flush(), False)


def token_message(index: int, sampled: SampledToken, delta: TextDelta, answer: int) -> generation_pb2.Token:
    """Return the message for one generated token.

    Args:
        index: 0 for the first token that is generated.
        sampled: the token.
        delta: the text that became certain with it, and whether the answer ends.
        answer: which of the request's answers the token belongs to.
    """
    return generation_pb2.Token(
        index=index,
        token_id=sampled.token_id,
        text=delta.text,
        answer=answer,
        finish_reason=None if delta.finish is None else delta.finish.to_proto(),
        logprob=sampled.logprob,
        top_logprobs=[
            generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in sampled.top_logprobs
        ],
    )
