"""States to quantize, and where they are written to."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "slots", "tokens-first", "elements-apart"]


def random_states(kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of very different magnitude, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(kv_heads, tokens, head_dim, generator=generator)
    states *= torch.exp(2 * torch.randn(kv_heads, tokens, 1, generator=generator))
    states[:, tokens // 2] = 0
    return states.to(dtype).to(DEVICE)


def strided(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """NaNs of `shape`: contiguous, a slice of larger slots, tokens first, or elements not adjacent."""
    heads, tokens, head_dim = shape
    if layout == "contiguous":
        view = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    elif layout == "slots":
        slots = torch.full((2, heads, tokens + 9, head_dim), torch.nan, dtype=dtype, device=DEVICE)
        view = slots[1, :, 4 : 4 + tokens]
    elif layout == "tokens-first":
        view = torch.full((tokens, heads, head_dim), torch.nan, dtype=dtype, device=DEVICE).transpose(0, 1)
    else:
        view = torch.full((heads, head_dim, tokens), torch.nan, dtype=dtype, device=DEVICE).transpose(1, 2)
    assert view.shape == shape
    return view
