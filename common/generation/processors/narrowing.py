"""Processors that narrow the tokens among which one is drawn."""

import math

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.processors.base import Processor, Stage, processor
from spectrumkv.common.generation.vocabulary import Vocabulary

# The nucleus is first looked for among this many tokens: sorting the whole vocabulary takes 10 ms for 150 000 tokens.
NUCLEUS_CANDIDATES = 1024


@processor("temperature", Stage.NARROW)
def temperature(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what divides the scores by the temperature."""
    warp = TemperatureLogitsWarper(float(params.temperature))
    # With the largest score at 0, division by a low temperature cannot make it infinite.
    return lambda scores, _: warp(None, scores - scores.max())


@processor("min_p", Stage.NARROW)
def min_p(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what keeps tokens at least a fraction as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    if not params.min_p:
        return None
    warp = MinPLogitsWarper(float(params.min_p))
    return lambda scores, _: warp(None, scores)


@processor("top_k", Stage.NARROW)
def top_k(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what keeps the k likeliest tokens, and those as likely as the k-th."""
    if not params.top_k:
        return None
    warp = TopKLogitsWarper(params.top_k)
    return lambda scores, _: warp(None, scores)


@processor("top_p", Stage.NARROW)
def top_p(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what keeps the nucleus (Holtzman et al., ICLR 2020, section 3.1)."""
    if params.top_p >= 1:
        return None
    return lambda scores, _: _nucleus(scores, params.top_p)


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
