"""How chosen tokens become the text that a client sees, and when generation ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from transformers import PreTrainedTokenizerFast

from spectrumkv.common.generation.detokenizer import Detokenizer
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import SampledToken
from spectrumkv.v1 import generation_pb2


class FinishReason(Enum):
    """Why generation ended; the values are those of the protocol's `FinishReason`."""

    STOP = generation_pb2.FINISH_REASON_STOP
    LENGTH = generation_pb2.FINISH_REASON_LENGTH

    def to_proto(self) -> generation_pb2.FinishReason:
        """The protocol's name for this reason."""
        return self.value

    @classmethod
    def from_proto(cls, value: generation_pb2.FinishReason) -> "FinishReason":
        """Read the protocol's value.

        Raises:
            ValueError: it is unspecified or unknown.
        """
        return cls(value)


@dataclass(frozen=True)
class TextDelta:
    """What one token adds.

    Attributes:
        text: may be empty; never splits a character.
        finish: set where this token is the last one; `text` then holds everything that was held back.
    """

    text: str
    finish: FinishReason | None = None


class StopStrings:
    """Passes text on until a stop string is complete in it.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first counts,
    as it would if each piece were one character; of two that end at the same place the longer one.

    Args:
        stop: strings of at least one character.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return text that no stop string can claim any more, and whether one was found.

        What might still be the start of a stop string is held back. After one is found nothing is left to say.
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
        """Return what is held back: no stop string will be completed."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-length:]) for one in self._stop):
                return length
        return 0


class TextStream:
    """The text of one request, token by token.

    Deterministic: a stream that gets the same tokens returns the same deltas, so decode replays the token that
    prefill sampled. All deltas together are the decoded tokens (see `Detokenizer`) up to the first stop string. A
    token that ends generation has no text itself, be it special or not. Where the last token leaves a character
    incomplete, the text ends with U+FFFD, as `tokenizer.decode` has it.

    Args:
        tokenizer: the model's tokenizer.
        params: max_tokens, stop, stop_token_ids and ignore_eos are read here.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, params: SamplingParams, eos_token_ids: frozenset[int]
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop)
        self._last_token_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_token_ids)
        self._tokens_left = params.max_tokens
        self._ended = False

    def push(self, token_id: int) -> TextDelta:
        """Take the next token.

        A token that completes a stop string or is a stop token gives STOP even where it is the last that max_tokens
        allows.

        Raises:
            InternalError: the tokenizer cannot decode tokens one by one.
            ValueError: generation has ended already.
        """
        if self._ended:
            raise ValueError(f"token {token_id} comes after the last one")
        self._tokens_left -= 1
        if token_id in self._last_token_ids:
            rest, _ = self._release()
            return TextDelta(rest, FinishReason.STOP)
        text, stopped = self._stop_strings.push(self._detokenizer.push(token_id))
        if stopped:
            self._ended = True
            return TextDelta(text, FinishReason.STOP)
        if self._tokens_left == 0:
            rest, stopped = self._release()
            return TextDelta(text + rest, FinishReason.STOP if stopped else FinishReason.LENGTH)
        return TextDelta(text)

    def flush(self) -> str:
        """Return what is held back where generation ends from outside; nothing after a last token.

        Raises:
            InternalError: the tokenizer cannot decode tokens one by one.
        """
        if self._ended:
            return ""
        return self._release()[0]

    def _release(self) -> tuple[str, bool]:
        """End the text; return what was held back, and whether a stop string was in it."""
        self._ended = True
        text, stopped = self._stop_strings.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._stop_strings.flush(), False)


def token_message(index: int, sampled: SampledToken, text: str) -> generation_pb2.Token:
    """Return the message for one generated token and the text that became certain with it."""
    return generation_pb2.Token(
        index=index,
        token_id=sampled.token_id,
        text=text,
        logprob=sampled.logprob,
        top_logprobs=[
            generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in sampled.top_logprobs
        ],
    )
