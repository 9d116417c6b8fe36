"""The model's keys and values as the spectral transform takes them: in another order, centred, without rotation.

A row is one token in one head. Rows are taken and put back some at a time: those at indices `first` and up of an
order. They come from memory and go to memory (see `spectrumkv.kernels.jit.strided.flat`), in which `start` is the
index of a head's first token. All loops are compiled for CPUs.
"""

from typing import Any

from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import fetch

# How many rows before its turn one is fetched: tokens come in an order that no processor foresees.
AHEAD = 8


@compiled
def fetch_ahead(states: Any, start: int, token_stride: int, order: Any, index: int, head_dim: int) -> None:
    """Ask for the row whose turn comes `AHEAD` rows after that of `index`, or for the last one."""
    token = order[min(index + AHEAD, order.size - 1)]
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

    Turning keys back undoes the rotary embedding (RoFormer, arXiv 2104.09864, section 3.2), which hides what keys at
    different positions have in common.

    Args:
        states: float32, memory.
        start: see the module.
        token_stride: elements from token to token.
        order: int64 `[m]`, tokens.
        first: the first index in `order`.
        count: how many tokens.
        cosine: float32 `[n, d / 2]`, of each token's angles.
        sine: like `cosine`.
        scaling: float32, factor of the turned elements.
        mean: float32 `[d]`, taken away from them.
        rows: float32 `[count or more, d or more]`, written.
    """
    head_dim = mean.size
    half = head_dim // 2
    center, high_center = mean[:half], mean[half:]
    for index in range(count):
        fetch_ahead(states, start, token_stride, order, first + index, head_dim)
        token = order[first + index]
        at = start + token * token_stride
        low, high = states[at : at + half], states[at + half : at + head_dim]
        turn, lift = cosine[token], sine[token]
        centred, high_centred = rows[index, :half], rows[index, half:head_dim]
        for j in range(half):
            centred[j] = (low[j] * turn[j] + high[j] * lift[j]) * scaling - center[j]
            high_centred[j] = (high[j] * turn[j] - low[j] * lift[j]) * scaling - high_center[j]


@compiled
def gather(
    states: Any, start: int, token_stride: int, order: Any, first: int, count: int, mean: Any, rows: Any
) -> None:
    """Take tokens' values in an order and centre them: `gather_unrotated` for states without a rotary embedding.

    Args:
        states: float32, memory.
        start: see the module.
        token_stride: elements from token to token.
        order: int64 `[m]`, tokens.
        first: the first index in `order`.
        count: how many tokens.
        mean: float32 `[d]`, taken away.
        rows: float32 `[count or more, d or more]`, written.
    """
    head_dim = mean.size
    for index in range(count):
        fetch_ahead(states, start, token_stride, order, first + index, head_dim)
        at = start + order[first + index] * token_stride
        row, centred = states[at : at + head_dim], rows[index]
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
    """Undo `gather_unrotated`: add the mean, turn keys by the angle of their position, and put them back.

    Args:
        rows: float32 `[count or more, d or more]`.
        order: int64 `[m]`, tokens.
        first: the first index in `order`.
        count: how many tokens.
        cosine: float32 `[n, d / 2]`, of each token's angles.
        sine: like `cosine`.
        scaling: float32, factor of the turned elements, the inverse of `gather_unrotated`'s.
        mean: float32 `[d]`.
        states: float32, memory; of it these tokens are written.
        start: see the module.
        token_stride: elements from token to token.
    """
    head_dim = mean.size
    half = head_dim // 2
    center, high_center = mean[:half], mean[half:]
    for index in range(count):
        fetch_ahead(states, start, token_stride, order, first + index, head_dim)
        token = order[first + index]
        at = start + token * token_stride
        low, high = states[at : at + half], states[at + half : at + head_dim]
        turn, lift = cosine[token], sine[token]
        centred, high_centred = rows[index, :half], rows[index, half:head_dim]
        for j in range(half):
            one, other = centred[j] + center[j], high_centred[j] + high_center[j]
            low[j] = (one * turn[j] - other * lift[j]) * scaling
            high[j] = (other * turn[j] + one * lift[j]) * scaling


@compiled
def scatter(
    rows: Any, order: Any, first: int, count: int, mean: Any, states: Any, start: int, token_stride: int
) -> None:
    """Undo `gather`, with the same arguments: `states` is written, and of it these tokens only."""
    head_dim = mean.size
    for index in range(count):
        fetch_ahead(states, start, token_stride, order, first + index, head_dim)
        at = start + order[first + index] * token_stride
        row, centred = states[at : at + head_dim], rows[index]
        for j in range(head_dim):
            row[j] = centred[j] + mean[j]


@compiled
def gather_head(
    keys: Any, values: Any, head: int, rotation: Any, order: Any, first: int, count: int, mean: Any, rows: Any
) -> None:
    """Take tokens of one head, of keys by `gather_unrotated` and of values by `gather`.

    Args:
        keys: float32 memory, elements from head to head, elements from token to token; see `jit.strided.flat`.
        values: like `keys`.
        head: of both sides, keys' heads first.
        rotation: cosine and sine, float32 `[n, d / 2]`, of each token's angles, and the factor of a key that is
            turned back.
        order: int64 `[m]`, tokens.
        first: the first index in `order`.
        count: how many tokens.
        mean: float32 `[2 · heads, d]`, keys' heads first.
        rows: float32 `[count or more, d or more]`, written.
    """
    kv_heads = mean.shape[0] // 2
    if head < kv_heads:
        key_states, key_head, key_token = keys
        cosine, sine, scaling = rotation
        gather_unrotated(
            key_states, head * key_head, key_token, order, first, count, cosine, sine, scaling, mean[head], rows
        )
    else:
        value_states, value_head, value_token = values
        gather(value_states, (head - kv_heads) * value_head, value_token, order, first, count, mean[head], rows)


@compiled
def scatter_head(
    rows: Any, keys: Any, values: Any, head: int, rotation: Any, order: Any, first: int, count: int, mean: Any
) -> None:
    """Undo `gather_head`, with the same arguments but the factor of a turned key: the states are written."""
    kv_heads = mean.shape[0] // 2
    if head < kv_heads:
        key_states, key_head, key_token = keys
        cosine, sine, scaling = rotation
        scatter_rotated(
            rows, order, first, count, cosine, sine, scaling, mean[head], key_states, head * key_head, key_token
        )
    else:
        value_states, value_head, value_token = values
        scatter(rows, order, first, count, mean[head], value_states, (head - kv_heads) * value_head, value_token)
