"""Attention that tokens receive, on CPUs: products of a few KV heads at once, then one compiled pass over the logits.

Softmax, mask and sum over queries take three loops over a row while it is in the first-level cache, where torch's
operations each go through all rows. Nothing is masked: a row's loops run over what its query sees.

Processors that multiply bfloat16 do so at twice the rate of float32 and more. What is added to all keys changes no
softmax, so keys are centred first: biases, which can be a hundred times what differs between tokens, would take all
digits that bfloat16 has. A bound of the logits does change then; models with one stay at float32.
"""

from functools import lru_cache

import torch

from spectrumkv.kernels.attention_scores.cpu_loops import add_weights, centre
from spectrumkv.kernels.jit.strided import adjacent, array, flat

# Every so many tokens one is taken for the centre, which need not be exact.
CENTRE_STRIDE = 16
# Logits of so many bytes are made at once: of all KV heads of a short prompt, whose calls cost more than their
# arithmetic, and of one head of a long prompt, so that they are read while they are in a cache.
LOGITS_BYTES = 1 << 20


def accumulated_attention(
    queries: torch.Tensor, keys: torch.Tensor, window: int, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """See `spectrumkv.kernels.accumulated_attention`."""
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
            logits.div_(softcap).tanh_().mul_(softcap)
        add_weights(array(logits), window, seen, received[heads].numpy())
    return received


def _centred(keys: torch.Tensor) -> torch.Tensor:
    """The keys without what they share, bfloat16: their logits differ by one number for each query."""
    centred = torch.empty(keys.shape, dtype=torch.bfloat16)
    centre(*flat(adjacent(keys.float())), CENTRE_STRIDE, array(centred))
    return centred


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def prepare() -> None:
    """Compile, or load what an earlier process compiled."""
    # A bound keeps logits at float32 where they would be bfloat16.
    for softcap in (None, 1.0):
        accumulated_attention(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 1, None, softcap)
