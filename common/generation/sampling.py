"""Choosing the next token from a model's logits, alike in both services.

Prefill samples the first token and decode the others, in a batch that changes from step to step. So chance is a pure
function of the request's seed and the token's index (a counter-based generator, Salmon et al., SC 2011): no state
of a generator crosses the network or depends on the neighbours in the batch.
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

from spectrumkv.common.errors import InternalError, InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams

__all__ = ["SampledToken", "Sampler", "SamplingParams", "TokenLogprob", "uniform"]

# The nucleus is looked for among so many tokens before the whole vocabulary is sorted, which takes
# 10 ms for 150 000 tokens.
NUCLEUS_CANDIDATES = 1024


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability under the model."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class SampledToken:
    """A chosen token.

    Attributes:
        token_id: its id.
        logprob: log-softmax of the logits as the model made them, before penalty, temperature and filters; None
            where `SamplingParams.logprobs` is.
        top_logprobs: the likeliest tokens by the same measure, likeliest first, the lower id first where two are
            alike; the chosen token need not be among them.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


def uniform(seed: int, index: int) -> float:
    """Draw a number from [0, 1), the same whenever `seed` and `index` are.

    Philox4x64-10 with `seed` as its key and `index` as its counter. The upper 53 bits are turned into a float here:
    NumPy promises the stream of its bit generators across versions, but not that of its distributions.

    Args:
        seed: from 0 to 2**64 - 1.
        index: the token's index within its request.
    """
    bits = int(np.random.Philox(key=seed, counter=index).random_raw())
    return (bits >> 11) * 2.0**-53


class Sampler:
    """Chooses the tokens of one request.

    The model's logits are turned to float64 on the CPU; repetition penalty, temperature, top-k and top-p follow in
    this order, as in `transformers`, whose processors do the work. Then the inverse of the cumulative distribution
    over the tokens that are left, in the vocabulary's order, is taken at `uniform(seed, index)`. At temperature 0
    the largest logit after the penalty wins, the lowest id where several are alike.

    Args:
        params: how to choose; the seed must be set unless the temperature is 0.
        prompt_token_ids: seen by the repetition penalty.

    Raises:
        InvalidArgumentError: tokens are to be drawn and there is no seed.
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
        """Take note of a token that was chosen elsewhere; `sample` notes its own."""
        self._seen.add(token_id)

    def sample(self, logits: torch.Tensor, index: int) -> SampledToken:
        """Choose a token.

        Args:
            logits: `[vocab]`, any float dtype, on any device.
            index: 0 for the first token that is generated.

        Raises:
            InternalError: a logit is infinite or NaN.
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
        """Choose from `scores`, float64 `[vocab]`, by chance."""
        assert self._params.seed is not None
        # With the largest score at 0 no temperature, however low, makes an infinity of it.
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
    """Return `logits` as float64 on the CPU."""
    if logits.dim() != 1 or not len(logits):
        raise ValueError(f"logits are {tuple(logits.shape)}; one row [vocab] is wanted")
    row = logits.detach().to("cpu", torch.float64)
    # An infinity or NaN always shows in the sum, which is quicker than looking at every element.
    if not math.isfinite(float(row.sum())):
        broken = int((~row.isfinite()).sum())
        raise InternalError(
            f"the model's logits for token {index} cannot be used: {broken} of {len(row)} are infinite or NaN"
        )
    return row


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set all but the smallest set of tokens whose probabilities sum to at least `top_p` to -inf.

    The same as `TopPLogitsWarper(top_p)`, mostly without sorting the vocabulary: where the likeliest tokens together
    have probability m >= top_p, the nucleus lies among them, and is their own nucleus at top_p / m.

    Args:
        scores: float64 `[vocab]`; -inf for tokens that are out already.
        top_p: in (0, 1).
    """
    candidates = scores.topk(min(NUCLEUS_CANDIDATES, len(scores))).indices
    mass = float(scores.softmax(dim=-1)[candidates].sum())
    if mass < top_p:
        nucleus: torch.Tensor = TopPLogitsWarper(top_p)(None, scores.unsqueeze(0))[0]
        return nucleus
    kept = TopPLogitsWarper(top_p / mass)(None, scores[candidates].unsqueeze(0))[0]
    return torch.full_like(scores, -math.inf).index_copy_(0, candidates, kept)
