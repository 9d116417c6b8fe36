"""Measures how far next-token distributions over received KV are from those over exact KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Positions whose distributions are in memory at once in float64.
POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Distance:
    """Holds the outcome of a comparison, summed over tokens.

    Attributes:
        nll: negative log-likelihood of the tokens, in nats.
        nll_fp16: the same over exact KV.
        kl: Kullback–Leibler divergence from the distributions over exact KV, in nats.
        agreed: tokens where both have the same most likely next token.
    """

    nll: float
    nll_fp16: float
    kl: float
    agreed: int


def compare(logits: torch.Tensor, reference: torch.Tensor, targets: Sequence[int]) -> Distance:
    """Compare next-token distributions, in float64.

    Args:
        logits: `[m, vocab]` of any float dtype, over received KV.
        reference: `[m, vocab]` on the same device, over exact FP16 KV.
        targets: the m tokens that really come next.

    Returns:
        Sums over the m tokens, in nats.
    """
    wanted = torch.tensor(targets, device=logits.device)[:, None]
    nll = nll_fp16 = kl = 0.0
    for first in range(0, len(targets), POSITIONS_AT_ONCE):
        rows = slice(first, first + POSITIONS_AT_ONCE)
        ours = torch.log_softmax(logits[rows].double(), dim=-1)
        theirs = torch.log_softmax(reference[rows].double(), dim=-1)
        nll -= float(ours.gather(1, wanted[rows]).sum())
        nll_fp16 -= float(theirs.gather(1, wanted[rows]).sum())
        kl += float((theirs.exp() * (theirs - ours)).sum())
    agreed = int((logits.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
    return Distance(nll, nll_fp16, kl, agreed)


def mean_kl(distances: Sequence[Distance], predictions: int) -> float:
    """Return the mean divergence in nats a token.

    Args:
        distances: of one or more texts.
        predictions: how many tokens the distances are summed over, together.

    Returns:
        Infinity where a distribution holds no numbers any more.
    """
    return _nan_as_infinity(sum(one.kl for one in distances) / predictions)


def ppl_delta_pct(distances: Sequence[Distance], predictions: int) -> float:
    """Return by how many per cent perplexity over received KV is higher than over exact KV.

    Args:
        distances: of one or more texts.
        predictions: how many tokens the distances are summed over, together.

    Returns:
        Infinity where a distribution holds no numbers any more.
    """
    return _nan_as_infinity(100 * float(np.expm1(sum(one.nll - one.nll_fp16 for one in distances) / predictions)))


def _nan_as_infinity(value: float) -> float:
    return float("inf") if np.isnan(value) else value
