"""Attention of one decode step over the slots of several requests, on GPUs.

The keys of a row are divided among programs, its splits, since a decode step has too few rows to fill a GPU; a second
kernel combines what they found (Flash-Decoding, pytorch.org/blog/flash-decoding). Nothing on the host depends on how
long a request is, so that a step can be captured in a CUDA graph once and replayed for any.
"""

import torch
import triton
import triton.language as tl

from spectrumkv.kernels.triton_shared import jit

# Programs that share a row's keys in one KV head: a few short ones do no harm, and a lone request fills the GPU.
SPLITS = 16
# Tokens that a program looks at together.
BLOCK_TOKENS = 64
# Triton multiplies matrices of no fewer rows than this.
LEAST_GROUP = 16


@jit
def _split_kernel(
    queries_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    keep_mask_ptr: tl.tensor,
    firsts_ptr: tl.tensor,
    newest_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    softmax_ptr: tl.tensor,
    stride_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_head: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    capped: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """Attend over one split of a row's keys, in one KV head. The grid is (rows, KV heads, splits).

    Written are the weighted sum of values, not yet divided, the greatest logit, and the sum of weights.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    end = tl.load(newest_ptr + row) + 1
    first = tl.load(firsts_ptr + row)
    first = tl.maximum(first, end - window)
    blocks = tl.cdiv(tl.cdiv(end - first, block_tokens), splits)
    start = first + split * blocks * block_tokens
    stop = tl.minimum(start + blocks * block_tokens, end)

    query = tl.arange(0, padded_group)
    element = tl.arange(0, padded_dim)
    asked = (query < group)[:, None] & (element < head_dim)[None, :]
    query_ptr = queries_ptr + row * stride_row + (head * group + query)[:, None] * stride_query_head
    queries = tl.load(query_ptr + element[None, :], mask=asked, other=0.0)

    greatest = tl.full([padded_group], float("-inf"), tl.float32)
    total = tl.zeros([padded_group], tl.float32)
    attended = tl.zeros([padded_group, padded_dim], tl.float32)
    for at in range(start, stop, block_tokens):
        slot = at + tl.arange(0, block_tokens)
        seen = slot < stop
        seen &= tl.load(keep_mask_ptr + slot, mask=seen, other=0) != 0
        there = seen[:, None] & (element < head_dim)[None, :]
        # What nobody wrote may be NaN: it is not even loaded.
        offset = head.to(tl.int64) * stride_head + slot.to(tl.int64)[:, None] * head_dim + element[None, :]
        keys = tl.load(keys_ptr + offset, mask=there, other=0.0)
        values = tl.load(values_ptr + offset, mask=there, other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
        if capped:
            # tanh(x) = 1 − 2 / (e^2x + 1)
            logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
        logits = tl.where(seen[None, :], logits, float("-inf"))
        reached = tl.maximum(greatest, tl.max(logits, axis=1))
        # Where nothing was seen so far, minus infinity would be taken from itself.
        level = tl.where(reached == float("-inf"), 0.0, reached)
        faded = tl.exp(greatest - level)
        weights = tl.exp(logits - level[:, None])
        total = total * faded + tl.sum(weights, axis=1)
        attended = attended * faded[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        greatest = reached

    offset = ((row * tl.num_programs(1) + head) * group + query) * splits + split
    tl.store(softmax_ptr + 2 * offset, greatest, mask=query < group)
    tl.store(softmax_ptr + 2 * offset + 1, total, mask=query < group)
    tl.store(partial_ptr + offset[:, None] * head_dim + element[None, :], attended, mask=asked)


@jit
def _combine_kernel(
    partial_ptr: tl.tensor,
    softmax_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    splits: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
) -> None:
    """Combine the splits of one row and query head. The grid is (rows · query heads)."""
    head = tl.program_id(0)
    offset = head * splits + tl.arange(0, splits)
    element = tl.arange(0, padded_dim)
    there = (element < head_dim)[None, :]
    greatest = tl.load(softmax_ptr + 2 * offset)
    level = tl.max(greatest, axis=0)
    # Every row sees at least its newest token, so that the level is finite.
    faded = tl.exp(greatest - level)
    total = tl.sum(tl.load(softmax_ptr + 2 * offset + 1) * faded, axis=0)
    attended = tl.load(partial_ptr + offset[:, None] * head_dim + element[None, :], mask=there, other=0.0)
    attended = (tl.sum(attended * faded[:, None], axis=0) / total).to(attended_ptr.dtype.element_ty)
    tl.store(attended_ptr + head * head_dim + element, attended, mask=element < head_dim)


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    keep_mask: torch.Tensor,
    firsts: torch.Tensor,
    newest: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend over a run of slots for each row of a batch. CPU tensors work under `TRITON_INTERPRET=1` only.

    Args:
        queries: float32, float16 or bfloat16 `[batch, query_heads, head_dim]`, elements side by side; head h reads KV
            head h // (query_heads / kv_heads).
        keys: like `queries`, `[kv_heads, slots, head_dim]`, contiguous; those of all requests.
        values: like `keys`.
        keep_mask: bool `[slots]`, False where a token was dropped.
        firsts: int64 `[batch]`, the first slot of each row.
        newest: int64 `[batch]`, its last; that one is kept.
        scaling: factor of query · key before the softmax.
        sliding_window: the newest slots of a row that it sees; None is all.
        softcap: bound of the logits; None is no bound.

    Returns:
        `[batch, query_heads, head_dim]` in the queries' dtype.
    """
    batch, query_heads, head_dim = queries.shape
    kv_heads, slots, _ = keys.shape
    group = query_heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    partial = torch.empty(batch, query_heads, SPLITS, head_dim, dtype=torch.float32, device=queries.device)
    softmax = torch.empty(batch, query_heads, SPLITS, 2, dtype=torch.float32, device=queries.device)
    attended = torch.empty(batch, query_heads, head_dim, dtype=queries.dtype, device=queries.device)
    with torch.cuda.device(queries.get_device()):
        _split_kernel[batch, kv_heads, SPLITS](
            queries,
            keys,
            values,
            keep_mask.view(torch.uint8),
            firsts,
            newest,
            partial,
            softmax,
            queries.stride(0),
            queries.stride(1),
            keys.stride(0),
            scaling,
            softcap or 0.0,
            sliding_window or slots,
            capped=softcap is not None,
            group=group,
            padded_group=max(LEAST_GROUP, triton.next_power_of_2(group)),
            head_dim=head_dim,
            padded_dim=padded_dim,
            block_tokens=BLOCK_TOKENS if padded_dim <= 128 else BLOCK_TOKENS // 2,
        )
        _combine_kernel[(batch * query_heads,)](
            partial, softmax, attended, splits=SPLITS, head_dim=head_dim, padded_dim=padded_dim
        )
    return attended
