"""Chooses the next token from a model's logits, in the same way in both services.

Prefill samples the first token and decode the others, in a batch that changes from step to step. So the random number
of a token is a pure function of the request's seed and the token's index, by the counter-based generator Philox
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): no generator state crosses the network or
depends on the other requests in the batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.processors import History, make_processors
from spectrumkv.common.generation.vocabulary import Vocabulary

__all__ = ["SampledToken", "Sampler", "SamplingParams", "TokenLogprob", "logprobs_of", "uniform"]


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability under the model."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class SampledToken:
    """A chosen token.

    Attributes:
        token_id: the token's id.
        logprob: log-softmax of the model's logits before penalty, temperature and filters; None if
            `SamplingParams.logprobs` is None.
        top_logprobs: the likeliest tokens by the same measure, likeliest first, and of two equally likely ones the
            lower id first; the chosen token need not be among them.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


def uniform(seed: int, index: int) -> float:
    """Draw a number from [0, 1) that depends on `seed` and `index` only.

    Philox4x64-10 has `seed` as its key and `index` as its counter. The upper 53 bits are turned into a float here:
    NumPy promises that its bit generators give the same stream in every version, but not its distributions.

    Args:
        seed: from 0 to 2**64 - 1.
        index: the token's index within its request.

    Returns:
        The number, uniformly distributed.
    """
    bits = int(np.random.Philox(key=seed, counter=index).random_raw())
    return (bits >> 11) * 2.0**-53


class Sampler:
    """Chooses the tokens of one answer.

    The model's logits become float64 on the CPU, and the logits processors that the parameters ask for have their
    turns (`common/generation/processors/`). The chosen token is the inverse of the cumulative distribution over the
    remaining tokens, in the vocabulary's order, at `uniform(seed, index)`. At temperature 0 it is the token with the
    largest score, and of several such tokens the one with the lowest id.

    Args:
        params: of one answer; the seed must be set unless the temperature is 0.
        prompt_token_ids: the prompt, for the repetition penalty.
        vocabulary: the model's; min_tokens, bad_words and structured_output need it.

    Raises:
        InvalidArgumentError: the temperature is above 0 and there is no seed.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Iterable[int], vocabulary: Vocabulary | None = None
    ) -> None:
        if params.seed is None and params.temperature > 0:
            raise InvalidArgumentError(
                f"sampling at temperature {params.temperature:g} needs a seed and none is set; prefill sets one at "
                "random before it samples"
            )
        self._params = params
        self._history = History(prompt_token_ids)
        self._processors = make_processors(params, vocabulary)

    def observe(self, token_id: int) -> None:
        """Take a token that another sampler chose; `sample` takes its own."""
        self._history.append(token_id)

    def sample(self, logits: torch.Tensor, index: int) -> SampledToken:
        """Choose a token.

        Args:
            logits: `[vocab]`, any float dtype, on any device.
            index: 0 for the first token that is generated.

        Returns:
            The token, with log-probabilities if the request asks for them.

        Raises:
            NotFiniteError: a logit is infinite or NaN.
            InvalidArgumentError: the request rules out every token.
            ValueError: `logits` has another shape.
        """
        row = _checked(logits, index)
        scores = row
        for process in self._processors:
            scores = process(scores, self._history)
        if scores.max() == -math.inf:
            raise InvalidArgumentError(
                f"no token is left for token {index} of the answer: min_tokens, bad_words and structured_output "
                "together rule out all; loosen one of them"
            )
        token_id = int(scores.argmax()) if self._params.temperature == 0 else self._draw(scores, index)
        self.observe(token_id)
        return self._with_logprobs(token_id, row)

    def _draw(self, scores: torch.Tensor, index: int) -> int:
        """Return a random token id, drawn by `scores`, float64 `[vocab]`."""
        assert self._params.seed is not None
        probabilities = scores.softmax(dim=-1)
        possible = probabilities.nonzero().squeeze(-1)
        cumulative = probabilities[possible].cumsum(dim=-1)
        place = int(torch.searchsorted(cumulative, uniform(self._params.seed, index) * cumulative[-1], right=True))
        # The product may be rounded up to the sum itself, which lies beyond the last token.
        return int(possible[min(place, len(possible) - 1)])

    def _with_logprobs(self, token_id: int, row: torch.Tensor) -> SampledToken:
        if self._params.logprobs is None:
            return SampledToken(token_id)
        return logprobs_of(row, token_id, self._params.logprobs)


def logprobs_of(row: torch.Tensor, token_id: int, top: int) -> SampledToken:
    """Return a token with its log-probability and the likeliest tokens.

    Args:
        row: float64 `[vocab]`, the model's logits.
        token_id: the token.
        top: how many of the likeliest tokens to give.

    Returns:
        The token.
    """
    logprobs = row.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(top, len(row)))
    likeliest = [TokenLogprob(*pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    likeliest.sort(key=lambda one: (-one.logprob, one.token_id))
    return SampledToken(token_id, float(logprobs[token_id]), tuple(likeliest))


def _checked(logits: torch.Tensor, index: int) -> torch.Tensor:
    """Return `logits` as float64 on the CPU.

    Raises:
        ValueError: `logits` is not one row.
        NotFiniteError: a logit is infinite or NaN.
    """
    if logits.dim() != 1 or not len(logits):
        raise ValueError(f"logits have the shape {tuple(logits.shape)}; allowed: one row [vocab]")
    row = logits.detach().to("cpu", torch.float64)
    # An infinity or NaN always shows in the sum, which is faster than a test of every element.
    if not math.isfinite(float(row.sum())):
        broken = int((~row.isfinite()).sum())
        raise NotFiniteError(
            f"the model's logits for token {index} cannot be used: {broken} of {len(row)} are infinite or NaN"
        )
    return row
