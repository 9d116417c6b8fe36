"""From the model's keys and values to the spectral codec's: tokens in another order, centred, keys without rotation.

A row is one token in one head. Rows are taken and put back some at a time: those at places `first` and up of an
order. Where they come from or go to is memory, see `spectrumkv.kernels.strided.flat`, and `start` is where a head's
first token lies in it.
"""

from typing import Any

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import fetch

# How many rows before its turn one is fetched: tokens come in an order that no processor foresees.
AHEAD = 8


@compiled
def fetch_ahead(states: Any, start: int, token_stride: int, order: Any, place: int, head_dim: int) -> None:
    """Ask for the row whose turn comes `AHEAD` places after `place`, or for the last one."""
    token = order[min(place + AHEAD, order.size - 1)]
    fetch(states, start + token * token_stride, head_dim)


@compiled
def gather_unrotated(
    states: Any,
    start: int,
    token_stride: int,
    order: Any,
    first: int,
    count: int,
    cosine: Any,
    sine: Any,
    scaling: float,
    mean: Any,
    rows: Any,
) -> None:
    """Take tokens' keys in an order, turn elements j and j + d/2 back by the angle of their position, and centre.

    Args:
        states: float32, memory.
        start: see the module.
        token_stride: elements from token to token.
        order: int64 `[m]`, tokens.
        first: the first place in `order`.
        count: how many places.
        cosine: float32 `[n, d / 2]`, of each token's angles.
        sine: like `cosine`.
        scaling: float32, factor of the turned elements.
        mean: float32 `[d]`, taken away from them.
        rows: float32 `[count or more, d or more]`, written.
    """
    head_dim = mean.size
    half = head_dim // 2
    center, high_center = mean[:half], mean[half:]
    for place in range(count):
        fetch_ahead(states, start, token_stride, order, first + place, head_dim)
        token = order[first + place]
        at = start + token * token_stride
        low, high = states[at : at + half], states[at + half : at + head_dim]
        turn, lift = cosine[token], sine[token]
        centred, high_centred = rows[place, :half], rows[place, half:head_dim]
        for j in range(half):
            centred[j] = (low[j] * turn[j] + high[j] * lift[j]) * scaling - center[j]
            high_centred[j] = (high[j] * turn[j] - low[j] * lift[j]) * scaling - high_center[j]


@compiled
def gather(
    states: Any, start: int, token_stride: int, order: Any, first: int, count: int, mean: Any, rows: Any
) -> None:
    """`gather_unrotated` for values, which have no rotary embedding."""
    head_dim = mean.size
    for place in range(count):
        fetch_ahead(states, start, token_stride, order, first + place, head_dim)
        at = start + order[first + place] * token_stride
        row, centred = states[at : at + head_dim], rows[place]
        for j in range(head_dim):
            centred[j] = row[j] - mean[j]


@compiled
def scatter_rotated(
    rows: Any,
    order: Any,
    first: int,
    count: int,
    cosine: Any,
    sine: Any,
    scaling: float,
    mean: Any,
    states: Any,
    start: int,
    token_stride: int,
) -> None:
    """Inverse of `gather_unrotated`; `scaling` is the inverse, and of `states` these places' tokens are written."""
    head_dim = mean.size
    half = head_dim // 2
    center, high_center = mean[:half], mean[half:]
    for place in range(count):
        fetch_ahead(states, start, token_stride, order, first + place, head_dim)
        token = order[first + place]
        at = start + token * token_stride
        low, high = states[at : at + half], states[at + half : at + head_dim]
        turn, lift = cosine[token], sine[token]
        centred, high_centred = rows[place, :half], rows[place, half:head_dim]
        for j in range(half):
            one, other = centred[j] + center[j], high_centred[j] + high_center[j]
            low[j] = (one * turn[j] - other * lift[j]) * scaling
            high[j] = (other * turn[j] + one * lift[j]) * scaling


@compiled
def scatter(
    rows: Any, order: Any, first: int, count: int, mean: Any, states: Any, start: int, token_stride: int
) -> None:
    """Inverse of `gather`."""
    head_dim = mean.size
    for place in range(count):
        fetch_ahead(states, start, token_stride, order, first + place, head_dim)
        at = start + order[first + place] * token_stride
        row, centred = states[at : at + head_dim], rows[place]
        for j in range(head_dim):
            row[j] = centred[j] + mean[j]
