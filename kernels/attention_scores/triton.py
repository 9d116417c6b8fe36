"""Attention that tokens receive, on GPUs: two launches, and no logits in memory.

The first launch finds what each query's softmax is divided by; the keys are divided among programs, its splits, since
a window of queries does not fill a GPU (Flash-Decoding, pytorch.org/blog/flash-decoding). The second computes the
logits again, a block of tokens at a time, and adds up what each token receives (an online softmax in two passes,
Milakov and Gimelshein, arXiv 1805.02867). Every sum has one order, so that equal prompts get equal scores.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from spectrumkv.kernels.triton_shared import Jit, jit

# Programs that share the keys of a block of queries.
SPLITS = 8
# Queries and tokens that a program looks at together: no fewer than Triton multiplies. Wide queries, in bytes, leave
# room for half as many in an SM's shared memory.
BLOCK_QUERIES, BLOCK_TOKENS = 64, 32
WIDE_BYTES = 512
# Triton multiplies matrices of no fewer columns than this.
LEAST_DIM = 16
# The interpreter multiplies the bits of bfloat16 and not its numbers.
INTERPRETED: bool = triton.knobs.runtime.interpret

# A kernel of its own for each divisor of a prompt's length would be compiled while a request waits.
_jit_for_any_prompt: Jit = triton.jit(do_not_specialize=["tokens", "window", "reach"])


@jit
def _queries(
    queries_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_position: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    window: tl.tensor,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    in_float32: tl.constexpr,
) -> tl.tensor:
    """Return rows of a KV head's queries, `[rows, padded_dim]`: row r has query head r // w at position r % w."""
    element = tl.arange(0, padded_dim)
    mask = (row < group * window)[:, None] & (element < head_dim)[None, :]
    query_head = (head * group + row // window).to(tl.int64)
    rows_ptr = (
        queries_ptr + query_head[:, None] * stride_head + (row % window).to(tl.int64)[:, None] * stride_position
    )
    queries = tl.load(rows_ptr + element[None, :], mask=mask, other=0.0)
    return queries.to(tl.float32) if in_float32 else queries


@jit
def _logits(
    queries: tl.tensor,
    keys_ptr: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    window: tl.tensor,
    reach: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    capped: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    in_float32: tl.constexpr,
) -> tl.tensor:
    """Return float32 `[rows, token block]`: the logits, minus infinity where a query does not see a token."""
    element = tl.arange(0, padded_dim)
    mask = (token < tokens)[:, None] & (element < head_dim)[None, :]
    keys_ptr += head * tl.cast(stride_head, tl.int64)
    keys = tl.load(keys_ptr + token.to(tl.int64)[:, None] * stride_token + element[None, :], mask=mask, other=0.0)
    if in_float32:
        keys = keys.to(tl.float32)
    logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
    if capped:
        # |tanh x| = (1 − e^−2|x|) / (1 + e^−2|x|), where nothing overflows.
        faded = tl.exp(-2.0 * tl.abs(logits) / softcap)
        bounded = softcap * ((1.0 - faded) / (1.0 + faded))
        logits = tl.where(logits < 0.0, -bounded, bounded)
    distance = (tokens - window + row % window)[:, None] - token[None, :]
    return tl.where((distance >= 0) & (distance < reach), logits, float("-inf"))


@_jit_for_any_prompt
def _softmax_kernel(
    queries_ptr: tl.tensor,
    query_stride_head: tl.tensor,
    query_stride_position: tl.tensor,
    keys_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    softmax_ptr: tl.tensor,
    tokens: tl.tensor,
    window: tl.tensor,
    reach: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    capped: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    in_float32: tl.constexpr,
    block_queries: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """Find the greatest logit of some queries in one split, and the sum of their weights relative to it.

    The grid is (blocks of queries, KV heads, splits).
    """
    head, split = tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    row = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    queries = _queries(
        queries_ptr,
        query_stride_head,
        query_stride_position,
        head,
        row,
        window,
        group,
        head_dim,
        padded_dim,
        in_float32,
    )
    # No query sees an earlier token.
    first = tl.maximum(0, tokens - window - reach + 1)
    blocks = tl.cdiv(tl.cdiv(tokens - first, block_tokens), splits)
    start = first + split * blocks * block_tokens
    stop = tl.minimum(start + blocks * block_tokens, tokens)
    greatest = tl.full([block_queries], float("-inf"), tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    for at in range(start, stop, block_tokens):
        logits = _logits(
            queries, keys_ptr, key_stride_head, key_stride_token, head, row, at + tl.arange(0, block_tokens), tokens,
            window, reach, scaling, softcap, capped, head_dim, padded_dim, in_float32,
        )  # fmt: skip
        reached = tl.maximum(greatest, tl.max(logits, axis=1))
        # Where nothing was seen so far, minus infinity would be taken from itself.
        level = tl.where(reached == float("-inf"), 0.0, reached)
        total = total * tl.exp(greatest - level) + tl.sum(tl.exp(logits - level[:, None]), axis=1)
        greatest = reached
    there = row < group * window
    offset = 2 * ((head * group * window + row) * splits + split)
    tl.store(softmax_ptr + offset, greatest, mask=there)
    tl.store(softmax_ptr + offset + 1, total, mask=there)


@_jit_for_any_prompt
def _scores_kernel(
    queries_ptr: tl.tensor,
    query_stride_head: tl.tensor,
    query_stride_position: tl.tensor,
    keys_ptr: tl.tensor,
    key_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    softmax_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    tokens: tl.tensor,
    window: tl.tensor,
    reach: tl.tensor,
    kv_heads: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    capped: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    in_float32: tl.constexpr,
    block_queries: tl.constexpr,
    block_tokens: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """Average what a block of tokens receives over query heads, and over the queries that see each token.

    The grid is (blocks of tokens).
    """
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    received = tl.zeros([block_tokens], tl.float32)
    for head in range(kv_heads):
        for at in range(0, group * window, block_queries):
            row = at + tl.arange(0, block_queries)
            there = row < group * window
            offset = 2 * ((head * group * window + row) * splits)[:, None] + 2 * tl.arange(0, splits)[None, :]
            # What is not there gets a sum of its own, so that nothing is divided by 0.
            greatest = tl.load(softmax_ptr + offset, mask=there[:, None], other=0.0)
            level = tl.max(greatest, axis=1)
            totals = tl.load(softmax_ptr + offset + 1, mask=there[:, None], other=1.0)
            total = tl.sum(totals * tl.exp(greatest - level[:, None]), axis=1)
            queries = _queries(
                queries_ptr, query_stride_head, query_stride_position, head, row, window, group, head_dim, padded_dim,
                in_float32,
            )  # fmt: skip
            logits = _logits(
                queries, keys_ptr, key_stride_head, key_stride_token, head, row, token, tokens, window, reach,
                scaling, softcap, capped, head_dim, padded_dim, in_float32,
            )  # fmt: skip
            weights = tl.exp(logits - level[:, None]) / total[:, None]
            received += tl.sum(tl.where(there[:, None], weights, 0.0), axis=0)
    # Query i stands at n − w + i, so a token has n − token queries behind it, of which w ask, and those in reach see
    # it.
    left = tokens - token
    seeing = tl.minimum(left, window) - tl.maximum(left - reach, 0)
    scores = received / (tl.maximum(seeing, 1) * group * kv_heads).to(tl.float32)
    tl.store(scores_ptr + token, scores, mask=token < tokens)


def mean_attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> torch.Tensor:
    """Average softmax weights; see `dispatch.mean_attention`. CPU tensors work under `TRITON_INTERPRET=1` only.

    Args:
        queries: `[query_heads, w, head_dim]`, any strides.
        keys: in the queries' dtype, `[kv_heads, n, head_dim]`, any strides.
        scaling: factor of query · key.
        sliding_window: how many of the newest tokens a query sees; None is all.
        softcap: bound of the logits; None is no bound.

    Returns:
        float32 `[n]` on the keys' device.
    """
    # Models leave the elements of a head side by side; a copy is made where they are not.
    queries, keys = (one if one.stride(2) == 1 else one.contiguous() for one in (queries, keys))
    kv_heads, tokens, head_dim = keys.shape
    query_heads, window, _ = queries.shape
    group, padded_dim = query_heads // kv_heads, max(LEAST_DIM, triton.next_power_of_2(head_dim))
    block_queries = BLOCK_QUERIES if padded_dim * keys.itemsize <= WIDE_BYTES else BLOCK_QUERIES // 2
    softmax = torch.empty(query_heads, window, SPLITS, 2, dtype=torch.float32, device=keys.device)
    scores = torch.empty(tokens, dtype=torch.float32, device=keys.device)
    states = (queries, *queries.stride()[:2], keys, *keys.stride()[:2])
    options: dict[str, Any] = {
        "capped": softcap is not None,
        "group": group,
        "head_dim": head_dim,
        "padded_dim": padded_dim,
        "in_float32": INTERPRETED,
        "block_queries": block_queries,
        "block_tokens": BLOCK_TOKENS,
    }
    # Farther than any token lies.
    reach = tokens if sliding_window is None else min(sliding_window, tokens)
    seen = (tokens, window, reach)
    with torch.cuda.device(keys.get_device()):
        _softmax_kernel[triton.cdiv(group * window, block_queries), kv_heads, SPLITS](
            *states, softmax, *seen, scaling, softcap or 0.0, **options
        )
        _scores_kernel[(triton.cdiv(tokens, BLOCK_TOKENS),)](
            *states, softmax, scores, *seen, kv_heads, scaling, softcap or 0.0, splits=SPLITS, **options
        )
    return scores
