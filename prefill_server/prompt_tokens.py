"""What a request hears of its own prompt: the tokens, their texts and their log-probabilities."""

from collections.abc import Iterator, Sequence

import torch
from tokenizers.decoders import DecodeStream

from spectrumkv.common.errors import NotFiniteError
from spectrumkv.common.generation.sampling import SampledToken, logprobs_of
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.v1 import generation_pb2, prefill_pb2

# Tokens of one message, which stays far below gRPC's limit with 20 log-probabilities for each.
TOKENS_PER_MESSAGE = 512


class PromptLogprobs:
    """Turns the logits of a prompt into log-probabilities of its tokens, as passes compute them.

    Args:
        token_ids: the prompt.
        top: how many of the likeliest tokens to give at each place.
    """

    def __init__(self, token_ids: Sequence[int], top: int) -> None:
        self._token_ids = token_ids
        self._top = top
        self.tokens: list[SampledToken] = []

    def put(self, logits: torch.Tensor) -> None:
        """Take the logits of the next tokens.

        Args:
            logits: `[tokens, vocab]` in the model's dtype and on its device; row i is what the model says comes after
                the i-th of these tokens.

        Raises:
            NotFiniteError: a logit is infinite or NaN.
        """
        for row in logits[: len(self._token_ids) - 1 - len(self.tokens)]:
            scores = row.to("cpu", torch.float64)
            if not bool(scores.isfinite().all()):
                raise NotFiniteError("the model's logits for the prompt cannot be used: some are infinite or NaN")
            self.tokens.append(logprobs_of(scores, self._token_ids[len(self.tokens) + 1], self._top))


def prompt_messages(
    loaded: LoadedModel, token_ids: Sequence[int], logprobs: PromptLogprobs | None
) -> Iterator[prefill_pb2.PromptTokens]:
    """Yield what a request hears of its prompt.

    Args:
        loaded: the model.
        token_ids: the prompt.
        logprobs: of all tokens but the first; None where they are not asked for.

    Yields:
        The tokens in order, some in each message.
    """
    texts = _texts(loaded, token_ids)
    tokens = [
        prefill_pb2.PromptToken(token_id=token_id, text=text) for token_id, text in zip(token_ids, texts, strict=True)
    ]
    for token, sampled in zip(tokens[1:], logprobs.tokens if logprobs else (), strict=logprobs is not None):
        assert sampled.logprob is not None
        token.logprob = sampled.logprob
        token.top_logprobs.extend(
            generation_pb2.TokenLogprob(token_id=one, logprob=value) for one, value in sampled.top_logprobs
        )
    for first in range(0, len(tokens), TOKENS_PER_MESSAGE):
        yield prefill_pb2.PromptTokens(tokens=tokens[first : first + TOKENS_PER_MESSAGE])


def _texts(loaded: LoadedModel, token_ids: Sequence[int]) -> list[str]:
    """Return texts of the tokens that together are the prompt's; a character's is that of its last token."""
    tokenizer = loaded.tokenizer.backend_tokenizer
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer, token_id) or "" for token_id in token_ids]
    whole: str = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    texts[-1] += whole.removeprefix("".join(texts)) if whole.startswith("".join(texts)) else ""
    return texts
