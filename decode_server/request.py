"""One admitted request on the decode side, and how far its generation has come."""

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError
from spectrumkv.common.generation.sampling import SampledToken, Sampler
from spectrumkv.common.generation.text import FinishReason, TextStream
from spectrumkv.common.kv.codecs.base import SegmentDecoder
from spectrumkv.decode_server.kv_pool import Allocation


@dataclass(frozen=True)
class GeneratedToken:
    """One token, and the text that can no longer change once it is known.

    Attributes:
        index: 0 is the token that prefill sampled, so decode's first is 1.
        sampled: token id and log-probabilities.
        text: may be empty, never splits a character.
        finish: why generation ended; None before the last token.
        made_at: seconds of the monotonic clock at which the token was chosen.
    """

    index: int
    sampled: SampledToken
    text: str
    finish: FinishReason | None
    made_at: float


@dataclass(eq=False, kw_only=True)
class DecodeRequest:
    """An admitted request, from Begin to its last token.

    Attributes:
        request_id: what both services call the request in their logs.
        prompt_token_ids: the prompt, whose KV prefill sends; at least one token.
        allocation: the slots; slot i holds the KV of position i, prompt first.
        decoder: decodes segments in the codec that Begin named.
        sampler: chooses tokens; it has seen the prompt and every token so far.
        text: makes text of tokens; it has seen every token so far.
        output_token_ids: the tokens so far, the first of which prefill sampled; empty until the KV has arrived.
        recomputed_prompt_tokens: tokens of the prompt that the model computed here although prefill sends their KV;
            the model runner counts them.
        outcomes: tokens, or the error that ended the request, on their way from the engine to the RPC.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    allocation: Allocation
    decoder: SegmentDecoder
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
        self.outcomes.put(GeneratedToken(index, sampled, delta.text, delta.finish, time.monotonic()))
        return delta.finish is not None
