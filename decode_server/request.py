"""An admitted request on the decode side: its answers, and how far the generation of each has come."""

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError
from spectrumkv.common.generation.sampling import SampledToken, Sampler
from spectrumkv.common.generation.text import TextDelta, TextStream
from spectrumkv.common.kv.codecs.base import SegmentDecoder
from spectrumkv.decode_server.kv_pool import Allocation
from spectrumkv.v1 import decode_pb2


@dataclass(frozen=True)
class GeneratedToken:
    """One token, and the text that can no longer change once it is known.

    Attributes:
        answer: which of the request's answers the token belongs to, from 0.
        index: 0 is the token that prefill sampled, so decode's first is 1.
        sampled: token id and log-probabilities.
        delta: the token's text, and why the answer ends, if it does.
        made_at: seconds of the monotonic clock at which the token was chosen.
    """

    answer: int
    index: int
    sampled: SampledToken
    delta: TextDelta
    made_at: float


@dataclass(eq=False, kw_only=True)
class DecodeAnswer:
    """One answer of an admitted request, from Begin to its last token: a row of the running batch.

    Attributes:
        index: which of the request's answers it is, from 0.
        prompt_token_ids: the prompt, whose KV prefill sends; at least one token.
        allocation: the slots; slot i holds the KV of position i, prompt first.
        sampler: chooses tokens; it has seen the prompt and every token so far.
        text: makes text of tokens; it has seen every token so far.
        output_token_ids: the tokens so far, the first of which prefill sampled; empty until the KV has arrived.
        recomputed_prompt_tokens: tokens of the prompt that the model computed here although prefill sends their KV;
            the model runner counts them.
        outcomes: tokens, or the error that ended the request, on their way from the engine to the RPC; all answers of
            a request have the same queue.
    """

    index: int = 0
    prompt_token_ids: Sequence[int]
    allocation: Allocation
    sampler: Sampler
    text: TextStream
    output_token_ids: list[int] = field(default_factory=list)
    recomputed_prompt_tokens: int = 0
    outcomes: "queue.SimpleQueue[GeneratedToken | SpectrumKVError]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        if not 0 < self.prompt_tokens < self.allocation.capacity:
            raise ValueError(
                f"a prompt of {self.prompt_tokens} tokens leaves no room in {self.allocation.capacity} slots"
            )

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def last_token(self) -> int:
        """The newest token, which the next step reads."""
        return self.output_token_ids[-1]

    @property
    def position(self) -> int:
        """Position of `last_token`, counted from the prompt's first token: the slot that the next step fills."""
        return self.prompt_tokens + len(self.output_token_ids) - 1

    def start(self, first_token_id: int) -> None:
        """Take the token that prefill sampled, once all KV is in the slots.

        Raises:
            InvalidArgumentError: the token ends the generation, which End did not say.
        """
        self.output_token_ids.append(first_token_id)
        self.sampler.observe(first_token_id)
        if self.text.push(first_token_id).finish is not None:
            raise InvalidArgumentError(
                f"the first token, {first_token_id}, ends the generation, and End does not say `finished`"
            )

    def advance(self, logits: torch.Tensor) -> bool:
        """Choose the next token and put it into `outcomes`.

        Args:
            logits: float32 `[vocab]` on the CPU, what the model computed for `last_token`.

        Returns:
            Whether the token is the last one.

        Raises:
            InternalError: a logit is infinite or NaN, or the tokenizer cannot decode tokens one by one.
        """
        index = len(self.output_token_ids)
        sampled = self.sampler.sample(logits, index)
        self.output_token_ids.append(sampled.token_id)
        delta = self.text.push(sampled.token_id)
        self.outcomes.put(GeneratedToken(self.index, index, sampled, delta, time.monotonic()))
        return delta.finish is not None


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodeRequest:
    """An admitted request: the answers that it asks for, over one prompt.

    Attributes:
        decoder: decodes segments in the codec that Begin named.
        answers: one or more. Prefill's KV arrives in the slots of the first one.
    """

    decoder: SegmentDecoder
    answers: tuple[DecodeAnswer, ...]

    @property
    def allocation(self) -> Allocation:
        """Where the prompt's KV arrives."""
        return self.answers[0].allocation

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.answers[0].prompt_tokens

    @property
    def slots(self) -> int:
        """How many slots the request was given, for all answers together."""
        return sum(answer.allocation.capacity for answer in self.answers)

    @property
    def completion_tokens(self) -> int:
        """How many tokens decode generated so far; the first of each answer is prefill's."""
        return sum(max(0, len(answer.output_token_ids) - 1) for answer in self.answers)

    @property
    def recomputed_prompt_tokens(self) -> int:
        """See `DecodeAnswer`."""
        return sum(answer.recomputed_prompt_tokens for answer in self.answers)

    def start(self, first_tokens: Sequence[decode_pb2.FirstToken]) -> list[DecodeAnswer]:
        """Take the tokens that prefill sampled, and copy the KV, all of which is in the first answer's slots.

        Args:
            first_tokens: one for each answer.

        Returns:
            The answers that go on.

        Raises:
            InvalidArgumentError: a token ends its answer, which End did not say.
        """
        going_on = []
        for answer, first in zip(self.answers, first_tokens, strict=True):
            if not first.finished:
                answer.start(first.token_id)
                going_on.append(answer)
        for answer in going_on:
            if answer.allocation is not self.allocation:
                answer.allocation.copy_prompt(self.allocation, self.prompt_tokens)
        return going_on
