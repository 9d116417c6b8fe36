"""Attention of one decode step: the one place that picks an implementation."""

import torch

from spectrumkv.kernels.decode_attention import reference

# Torch's attention, which the reference calls, takes a call for each row, and at most a thread for each KV head. With
# so many threads it is faster than the compiled loops where rows have no fewer tokens than this on average.
MANY_THREADS, SHORT_TOKENS = 4, 1024


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    keep_mask: torch.Tensor | None,
    firsts: torch.Tensor,
    newest: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend over a run of slots for each row of a batch.

    On a GPU nothing waits for a length, so that the call can be captured in a CUDA graph.

    Args:
        queries: float32, float16 or bfloat16 `[batch, query_heads, head_dim]`, the elements of a head side by side;
            head h reads KV head h // (query_heads / kv_heads).
        keys: in the queries' dtype, `[kv_heads, slots, head_dim]`, contiguous; those of all requests.
        values: like `keys`.
        keep_mask: bool `[slots]`, False where a token was dropped. None where no row has a dropped token; on a GPU it
            is always given.
        firsts: int64 `[batch]`, the first slot of each row.
        newest: int64 `[batch]`, its last; that one is kept.
        scaling: factor of query · key before the softmax.
        sliding_window: how many of the newest slots a row sees; None is all.
        softcap: bound of the logits; None is no bound.

    Returns:
        `[batch, query_heads, head_dim]` in the queries' dtype.
    """
    if keys.is_cuda:
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.kernels.decode_attention import triton

        assert keep_mask is not None
        return triton.decode_attention(
            queries, keys, values, keep_mask, firsts, newest, scaling, sliding_window, softcap
        )
    # numba takes a third of a second to import.
    from spectrumkv.kernels.decode_attention import cpu

    if keep_mask is None and softcap is None and keys.dtype == torch.float32 and cpu.attends(keys.shape[2]):
        few_threads = min(torch.get_num_threads(), keys.shape[0]) < MANY_THREADS
        if few_threads or int((newest - firsts).sum()) < len(firsts) * SHORT_TOKENS:
            return cpu.decode_attention(queries, keys, values, firsts, newest, scaling, sliding_window)
    return reference.decode_attention(
        queries, keys, values, keep_mask, firsts, newest, scaling, sliding_window, softcap
    )


def prepare() -> None:
    """Compile what runs on CPUs, or load it from the cache, so that no request waits for it."""
    from spectrumkv.kernels.decode_attention import cpu

    cpu.prepare()
