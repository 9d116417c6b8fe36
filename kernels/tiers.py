"""The codes of tiers: the precision that a token's keys and values are sent at, as numbers.

Segments have these codes on the wire. A tier map has two bits a token, so it holds the first four.
`spectrumkv.common.kv.tiers.Tier` gives them names, costs and labels.
"""

import numpy as np

# At TIER_16BIT a token keeps its elements in the model's 16-bit dtype, at TIER_NATIVE in the model's own.
TIER_DROP, TIER_INT4, TIER_INT8, TIER_16BIT, TIER_NATIVE = TIER_CODES = range(5)


def tier_counts(tiers: np.ndarray) -> tuple[int, ...]:
    """Count the tokens of each tier.

    Args:
        tiers: uint8 `[n]`, codes of tiers.

    Returns:
        A number for each of `TIER_CODES`.
    """
    return tuple(np.bincount(tiers, minlength=len(TIER_CODES)).tolist())
