"""How far next-token distributions over received KV are from those over exact KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Positions whose distributions are in memory at once in float64.
POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Distance:
    """What a comparison found, summed over tokens.

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
        logits: `[m, vocab]`, over received KV.
        reference: `[m, vocab]`, over exact FP16 KV.
        targets: the m tokens that really come next.
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
