"""Attention that tokens receive, on CPUs: products of a few KV heads at once, then one compiled pass over the logits.

Softmax, mask and sum over queries take three loops over a row while it is in the first-level cache, where torch's
operations each go through all rows. Nothing is masked: a row's loops run over what its query sees.

Processors that have instructions for products of bfloat16 compute them at twice the rate of float32 and more. A
number that is added to all keys changes no softmax, so keys are centred first: biases, which can be a hundred times
what differs between tokens, would take all digits that bfloat16 has. Bounded logits do change with such a number, so
models that bound them stay at float32.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from spectrumkv.kernels.attention_scores.reference import mean_of_seeing, scaled
from spectrumkv.kernels.jit.compiled import compiled
from spectrumkv.kernels.jit.llvm import bfloat16
from spectrumkv.kernels.jit.softmax import ONE, ZERO, exponentials
from spectrumkv.kernels.jit.strided import adjacent, array, flat
from spectrumkv.kernels.logits import soft_cap

# One of so many tokens is taken for the centre, which need not be exact.
CENTRE_STRIDE = 16
# Logits of so many bytes are made at once: of all KV heads of a short prompt, whose calls cost more than their
# arithmetic, and of one head of a long prompt, so that they are read while they are in a cache.
LOGITS_BYTES = 1 << 20


def mean_attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Average softmax weights; see `dispatch.mean_attention`.

    Returns:
        float32 `[n]`.
    """
    window = queries.shape[1]
    received = accumulated_attention(scaled(queries, keys, scaling), keys, window, sliding_window, softcap)
    return mean_of_seeing(received, queries.shape, sliding_window)


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Sum softmax weights over queries, in bfloat16 where that is faster.

    Args:
        queries: float32 `[kv_heads, g · w, head_dim]`; see `reference.accumulated_attention`.
        keys: any float dtype `[kv_heads, n, head_dim]`, any strides.
        window: w.
        sliding_window: how many of the newest tokens a query sees; None is all.
        softcap: bound of the logits; None is no bound.

    Returns:
        float32 `[kv_heads, n]`.
    """
    kv_heads, tokens, _ = keys.shape
    received = torch.zeros(kv_heads, tokens)
    seen = min(sliding_window or tokens, tokens)
    if softcap is None and multiplies_bfloat16():
        queries, keys = queries.bfloat16(), _centred(keys)
    head_bytes = queries.shape[1] * tokens * queries.itemsize
    at_once = min(max(1, LOGITS_BYTES // head_bytes), kv_heads)
    memory = queries.new_empty(at_once, queries.shape[1], tokens)
    for first in range(0, kv_heads, at_once):
        heads = slice(first, first + at_once)
        asked = keys[heads].to(queries.dtype)
        logits = torch.bmm(queries[heads], asked.transpose(1, 2), out=memory[: len(asked)])
        if softcap is not None:
            soft_cap(logits, softcap, out=logits)
        add_weights(array(logits), window, seen, received[heads].numpy())
    return received


def _centred(keys: torch.Tensor) -> torch.Tensor:
    """Return the keys without what they share, bfloat16: their logits differ by one number for each query."""
    centred = torch.empty(keys.shape, dtype=torch.bfloat16)
    centre(*flat(adjacent(keys.float())), CENTRE_STRIDE, array(centred))
    return centred


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products of bfloat16."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def prepare() -> None:
    """Compile the loops, or load what an earlier process compiled."""
    # A bound keeps logits at float32 where they would be bfloat16.
    for softcap in (None, 1.0):
        accumulated_attention(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 1, None, softcap)


@compiled
def centre(keys: Any, head_stride: int, token_stride: int, stride: int, centred: Any) -> None:
    """Take from keys, head by head, the mean of every `stride`th token.

    Args:
        keys: float32, all memory of `[heads, n, d]`; see `spectrumkv.kernels.jit.strided.flat`.
        head_stride: elements from head to head.
        token_stride: elements from token to token.
        stride: from 1.
        centred: int16 `[heads, n, d]`, written: bfloat16's bits.
    """
    heads, tokens, head_dim = centred.shape
    mean = np.empty(head_dim, np.float32)
    share = ONE / np.float32((tokens + stride - 1) // stride)
    for head in range(heads):
        mean[:] = ZERO
        for token in range(0, tokens, stride):
            start = head * head_stride + token * token_stride
            key = keys[start : start + head_dim]
            for j in range(head_dim):
                mean[j] += key[j] * share
        for token in range(tokens):
            start = head * head_stride + token * token_stride
            key, row = keys[start : start + head_dim], centred[head, token]
            for j in range(head_dim):
                row[j] = bfloat16(key[j] - mean[j])


@compiled
def add_weights(logits: Any, window: int, sliding_window: int, received: Any) -> None:
    """Add up for each head the softmax of its rows. Nothing is masked: loops over a row run over what its query sees.

    Args:
        logits: `[heads, g · w, n]`, float32 or, for bfloat16, int16.
        window: w, how many of the last positions ask.
        sliding_window: how many of the newest tokens a query sees.
        received: float32 `[heads, n]`, added to.
    """
    heads, rows, tokens = logits.shape
    weights = np.empty(tokens, np.float32)
    for head in range(heads):
        for i in range(rows):
            end = tokens - window + i % window + 1
            first = max(0, end - sliding_window)
            row, target = weights[first:end], received[head, first:end]
            share = exponentials(logits[head, i, first:end], row)
            for j in range(row.size):
                target[j] += row[j] * share
