"""From the model's keys and values to the spectral codec's: tokens in another order, centred, keys without rotation.

A row is one token in one head.
"""

from typing import Any

from spectrumkv.kernels.compiled import compiled
from spectrumkv.kernels.prefetch import fetch

# How many rows before its turn one is fetched: tokens come in an order that no processor foresees.
AHEAD = 8


@compiled
def fetch_ahead(states: Any, head_start: int, token_stride: int, order: Any, place: int, head_dim: int) -> None:
    """Ask for the row whose turn comes `AHEAD` places after `place`, or for the last one."""
    token = order[min(place + AHEAD, order.size - 1)]
    fetch(states, head_start + token * token_stride, head_dim)


@compiled
def gather_unrotated(
    states: Any,
    head_stride: int,
    token_stride: int,
    order: Any,
    cosine: Any,
    sine: Any,
    scaling: float,
    mean: Any,
    gathered: Any,
) -> None:
    """Take tokens' keys in an order, turn elements j and j + d/2 back by the angle of their position, and centre.

    Args:
        states: float32, see `strided.flat`.
        head_stride: see `strided.flat`.
        token_stride: see `strided.flat`.
        order: int64 `[m]`, tokens.
        cosine: float32 `[n, d / 2]`, of each token's angles.
        sine: like `cosine`.
        scaling: float32, factor of the turned elements.
        mean: float32 `[heads, d]`, taken away from them.
        gathered: float32 `[heads, m, d]`, written.
    """
    half = gathered.shape[2] // 2
    for head in range(gathered.shape[0]):
        center, high_center = mean[head, :half], mean[head, half:]
        for place in range(order.size):
            fetch_ahead(states, head * head_stride, token_stride, order, place, gathered.shape[2])
            start = head * head_stride + order[place] * token_stride
            low, high = states[start : start + half], states[start + half : start + 2 * half]
            turn, lift = cosine[order[place]], sine[order[place]]
            centred, high_centred = gathered[head, place, :half], gathered[head, place, half:]
            for j in range(half):
                centred[j] = (low[j] * turn[j] + high[j] * lift[j]) * scaling - center[j]
                high_centred[j] = (high[j] * turn[j] - low[j] * lift[j]) * scaling - high_center[j]


@compiled
def gather(states: Any, head_stride: int, token_stride: int, order: Any, mean: Any, gathered: Any) -> None:
    """`gather_unrotated` for values, which have no rotary embedding."""
    head_dim = gathered.shape[2]
    for head in range(gathered.shape[0]):
        center = mean[head]
        for place in range(order.size):
            fetch_ahead(states, head * head_stride, token_stride, order, place, gathered.shape[2])
            start = head * head_stride + order[place] * token_stride
            row, centred = states[start : start + head_dim], gathered[head, place]
            for j in range(head_dim):
                centred[j] = row[j] - center[j]


@compiled
def scatter_rotated(
    gathered: Any,
    order: Any,
    cosine: Any,
    sine: Any,
    scaling: float,
    mean: Any,
    states: Any,
    head_stride: int,
    token_stride: int,
) -> None:
    """Inverse of `gather_unrotated`; `scaling` is the inverse, and of `states` the tokens in `order` are written."""
    half = gathered.shape[2] // 2
    for head in range(gathered.shape[0]):
        center, high_center = mean[head, :half], mean[head, half:]
        for place in range(order.size):
            fetch_ahead(states, head * head_stride, token_stride, order, place, gathered.shape[2])
            start = head * head_stride + order[place] * token_stride
            low, high = states[start : start + half], states[start + half : start + 2 * half]
            turn, lift = cosine[order[place]], sine[order[place]]
            centred, high_centred = gathered[head, place, :half], gathered[head, place, half:]
            for j in range(half):
                first, second = centred[j] + center[j], high_centred[j] + high_center[j]
                low[j] = (first * turn[j] - second * lift[j]) * scaling
                high[j] = (second * turn[j] + first * lift[j]) * scaling


@compiled
def scatter(gathered: Any, order: Any, mean: Any, states: Any, head_stride: int, token_stride: int) -> None:
    """Inverse of `gather`."""
    head_dim = gathered.shape[2]
    for head in range(gathered.shape[0]):
        center = mean[head]
        for place in range(order.size):
            fetch_ahead(states, head * head_stride, token_stride, order, place, gathered.shape[2])
            start = head * head_stride + order[place] * token_stride
            row, centred = states[start : start + head_dim], gathered[head, place]
            for j in range(head_dim):
                row[j] = centred[j] + center[j]
