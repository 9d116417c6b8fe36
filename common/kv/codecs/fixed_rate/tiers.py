"""Which tier a token of fixed width is reported under, and how many bytes each tier takes of a body."""

from collections.abc import Mapping

import numpy as np
import torch

from spectrumkv.common.kv.codecs.calibrated.importance import nearest_tiers
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS, RecordLayout


def record_tiers(layout: RecordLayout | None, rows: int, sinks: int) -> torch.Tensor:
    """Name the tier whose width is nearest to each token's bits per element.

    Args:
        layout: of the records; None where there are only sinks.
        rows: coefficients of a token.
        sinks: how many tokens before them are sent at FP16.

    Returns:
        uint8 `[n]` on the CPU, `Tier` values.
    """
    exact = np.full(sinks, Tier.FP16, np.uint8)
    if layout is None:
        return torch.from_numpy(exact)
    of_profile = nearest_tiers(layout.words_of_profile * (GROUP_ROWS / rows))
    return torch.from_numpy(np.concatenate([exact, of_profile[layout.profiles]]))


def tier_bytes(
    layout: RecordLayout | None, tiers: torch.Tensor, sink_bytes: int, body_bytes: int
) -> Mapping[Tier, int]:
    """Divide a body's bytes among the tiers: sinks and records by tier, and all else to the tier with most of them.

    Args:
        layout: of the records; None where there are only sinks.
        tiers: uint8 `[n]` on the CPU, the tokens' tiers, sinks first.
        sink_bytes: of the sinks.
        body_bytes: to be divided.

    Returns:
        Bytes of INT4, INT8 and FP16, `body_bytes` together.
    """
    shares = dict.fromkeys((Tier.INT4, Tier.INT8, Tier.FP16), 0)
    shares[Tier.FP16] = sink_bytes
    if layout is not None:
        words = layout.words_of_profile[layout.profiles]
        of_tokens = tiers.numpy()[len(tiers) - len(words) :]
        taken = np.bincount(of_tokens, 4.0 * words, minlength=len(Tier)).astype(np.int64).tolist()
        for tier in shares:
            shares[tier] += taken[tier]
    widest = max(shares, key=lambda tier: shares[tier])
    shares[widest] += body_bytes - sum(shares.values())
    return shares
