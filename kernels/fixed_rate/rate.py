"""How many words records take: the loops of rate control, compiled for CPUs."""

from typing import Any

from spectrumkv.kernels.jit.compiled import compiled


@compiled
def words_at(base: int, ratio: Any, count: Any, thresholds: Any) -> int:
    """Count the words of records.

    Args:
        base: of their steps, in units of half a ratio's.
        ratio: int64 `[m]`, binary logarithms of standard deviation ÷ step where the base is 0; see `layout.ratios`.
        count: int64 `[m]`, how many groups of rows have each.
        thresholds: int64, `layout.WIDTH_THRESHOLDS`.

    Returns:
        The words.
    """
    words = 0
    for index in range(ratio.size):
        if count[index]:
            own, width = ratio[index] - 2 * base, 0
            while width < thresholds.size and own > thresholds[width]:
                width += 1
            words += width * count[index]
    return words


@compiled
def finest_base(words: int, low: int, high: int, ratio: Any, count: Any, thresholds: Any) -> int:
    """Find the finest base at which records keep to a number of words; `high` where none does.

    Args:
        words: that the records may take.
        low: the finest base that is looked at.
        high: the coarsest one.
        ratio: see `words_at`.
        count: see `words_at`.
        thresholds: see `words_at`.

    Returns:
        The base.
    """
    while low < high:
        middle = (low + high) // 2
        if words_at(middle, ratio, count, thresholds) <= words:
            high = middle
        else:
            low = middle + 1
    return high
