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
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.generation.params import SamplingParams

__all__ = ["SampledToken", "Sampler", "SamplingParams", "TokenLogprob", "uniform"]

# The nucleus is first looked for among this many tokens: sorting the whole vocabulary takes 10 ms for 150 000 tokens.
NUCLEUS_CANDIDATES = 1024


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
    """Chooses the tokens of one request.

    The model's logits become float64 on the CPU. The processors of `transformers` then apply repetition penalty,
    temperature, top-k and top-p (nucleus sampling; Holtzman et al., "The curious case of neural text degeneration",
    ICLR 2020, section 3.1) in this order. The chosen token is the inverse of the cumulative distribution over the
    remaining tokens, in the vocabulary's order, at `uniform(seed, index)`. At temperature 0 it is the token with the
    largest logit after the penalty, and of several such tokens the one with the lowest id.

    Args:
        params: how to choose; the seed must be set unless the temperature is 0.
        prompt_token_ids: the prompt, for the repetition penalty.

    Raises:
        InvalidArgumentError: the temperature is above 0 and there is no seed.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Iterable[int]) -> None:
        if params.seed is None and params.temperature > 0:
            raise InvalidArgumentError(
                f"sampling at temperature {params.temperature:g} needs a seed and none is set; prefill sets one at "
                "random before it samples"
            )
        self._params = params
        self._seen = set(prompt_token_ids)

    def observe(self, token_id: int) -> None:
        """Tell the repetition penalty of a token that another sampler chose; `sample` tells of its own."""
        self._seen.add(token_id)

    def sample(self, logits: torch.Tensor, index: int) -> SampledToken:
        """Choose a token.

        Args:
            logits: `[vocab]`, any float dtype, on any device.
            index: 0 for the first token that is generated.

        Returns:
            The token, with log-probabilities if the request asks for them.

        Raises:
            NotFiniteError: a logit is infinite or NaN.
            ValueError: `logits` has another shape.
        """
        row = _checked(logits, index)
        scores = self._penalize(row)
        token_id = int(scores.argmax()) if self._params.temperature == 0 else self._draw(scores, index)
        self.observe(token_id)
        return self._with_logprobs(token_id, row)

    def _penalize(self, row: torch.Tensor) -> torch.Tensor:
        if self._params.repetition_penalty == 1 or not self._seen:
            return row
        penalize = RepetitionPenaltyLogitsProcessor(float(self._params.repetition_penalty))
        penalized: torch.Tensor = penalize(torch.tensor([list(self._seen)]), row.unsqueeze(0))[0]
        return penalized

    def _draw(self, scores: torch.Tensor, index: int) -> int:
        """Return a random token id, drawn by `scores`, float64 `[vocab]`."""
        assert self._params.seed is not None
        # With the largest score at 0, division by a low temperature cannot make it infinite.
        kept = TemperatureLogitsWarper(float(self._params.temperature))(None, scores - scores.max())
        if self._params.top_k:
            kept = TopKLogitsWarper(self._params.top_k)(None, kept)
        if self._params.top_p < 1:
            kept = _nucleus(kept, self._params.top_p)
        probabilities = kept.softmax(dim=-1)
        possible = probabilities.nonzero().squeeze(-1)
        cumulative = probabilities[possible].cumsum(dim=-1)
        place = int(torch.searchsorted(cumulative, uniform(self._params.seed, index) * cumulative[-1], right=True))
        # The product may be rounded up to the sum itself, which lies beyond the last token.
        return int(possible[min(place, len(possible) - 1)])

    def _with_logprobs(self, token_id: int, row: torch.Tensor) -> SampledToken:
        if self._params.logprobs is None:
            return SampledToken(token_id)
        logprobs = row.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(self._params.logprobs, len(row)))
        top = [TokenLogprob(*pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
        top.sort(key=lambda one: (-one.logprob, one.token_id))
        return SampledToken(token_id, float(logprobs[token_id]), tuple(top))


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


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set all scores to -inf but those of the smallest set of tokens whose probabilities sum to at least `top_p`.

    The result is that of `TopPLogitsWarper(top_p)`, mostly without sorting the vocabulary: if the likeliest tokens
    together have probability m >= top_p, the nucleus is among them, and it is their own nucleus at top_p / m.

    Args:
        scores: float64 `[vocab]`; -inf for tokens that were removed before.
        top_p: in (0, 1).

    Returns:
        float64 `[vocab]`.
    """
    candidates = scores.topk(min(NUCLEUS_CANDIDATES, len(scores))).indices
    mass = float(scores.softmax(dim=-1)[candidates].sum())
    if mass < top_p:
        nucleus: torch.Tensor = TopPLogitsWarper(top_p)(None, scores.unsqueeze(0))[0]
        return nucleus
    kept = TopPLogitsWarper(top_p / mass)(None, scores[candidates].unsqueeze(0))[0]
    return torch.full_like(scores, -math.inf).index_copy_(0, candidates, kept)
