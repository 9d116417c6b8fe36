"""Attention layers whose pages lie in an order of their own, as a backend of vLLM has them."""

import torch

from spectrumkv.vllm_plugin.layers import EngineLayer

PAGE_TOKENS, PAGES = 16, 12


def fake_layers(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[EngineLayer]:
    """Layers with empty pages; keys lie column by column, values row by row after them."""

    def write(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        halves = pages.view(len(pages), kv_heads, 2, PAGE_TOKENS * head_dim)
        columns = halves[:, :, 0].view(-1, kv_heads, head_dim, PAGE_TOKENS)
        rows = halves[:, :, 1].view(-1, kv_heads, PAGE_TOKENS, head_dim)
        page, offset = slots // PAGE_TOKENS, slots % PAGE_TOKENS
        columns[page, :, :, offset] = keys
        rows[page, :, offset] = values

    return [
        EngineLayer(
            name=f"model.layers.{index}.self_attn.attn",
            index=index,
            scaling=head_dim**-0.5,
            softcap=None,
            sliding_window=None,
            pages=torch.zeros(PAGES, kv_heads, PAGE_TOKENS, 2 * head_dim, dtype=dtype),
            write=write,
        )
        for index in range(layers)
    ]
