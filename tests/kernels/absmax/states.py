"""States to quantize, where they are written to, and one format's share of a body."""

from types import ModuleType

import torch

from spectrumkv.kernels.absmax.layout import INT8, BodySections, CodeFormat, segment_layout
from spectrumkv.kernels.tiers import TIER_INT4, TIER_INT8

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


def quantized(
    implementation: ModuleType, states: torch.Tensor, form: CodeFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of all tokens at one format, from a body that starts as garbage.

    Returns:
        `[kv_heads, n, code bytes]` and float16 `[kv_heads, n]`.
    """
    kv_heads, tokens, head_dim = states.shape
    tiers = _tiers(tokens, form)
    layout = segment_layout(tiers, kv_heads, head_dim)
    body = torch.full((layout.bytes,), 0x5A, dtype=torch.uint8, device=states.device)
    implementation.encode(states, states, tiers, (0, tokens), body)
    codes, scales = BodySections(*layout.arrays(body)).coded(form)
    assert torch.equal(codes[0], codes[1])
    return codes[0], scales[0]


def dequantize(
    implementation: ModuleType, codes: torch.Tensor, scales: torch.Tensor, states: torch.Tensor, form: CodeFormat
) -> None:
    """Inverse of `quantized`: write all tokens of `states`."""
    kv_heads, tokens, head_dim = states.shape
    tiers = _tiers(tokens, form)
    layout = segment_layout(tiers, kv_heads, head_dim)
    body = torch.empty(layout.bytes, dtype=torch.uint8, device=states.device)
    its_codes, its_scales = BodySections(*layout.arrays(body)).coded(form)
    its_codes[:], its_scales[:] = codes, scales
    other_side = torch.full_like(states, torch.nan)
    implementation.decode(body, tiers, (0, tokens), states, other_side)
    assert torch.equal(states.nan_to_num(7e4), other_side.nan_to_num(7e4))


def _tiers(tokens: int, form: CodeFormat) -> torch.Tensor:
    return torch.full((tokens,), TIER_INT8 if form == INT8 else TIER_INT4, dtype=torch.uint8)
