"""What goes into the kernels of a segment and comes out of them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TokenTransform:
    """The transform of the tokens of a segment, whose keys are turned back by their rotary angles.

    Attributes:
        cosine: float32 `[n, d / 2]` of the tokens' angles.
        sine: like `cosine`.
        scaling: factor that the rotary embedding applies to keys besides the rotation.
        mean: float32 `[2, kv_heads, d]`, keys' heads first, taken away before the transform.
        matrices: float32 `[2, kv_heads, d, d]`: for `analyse` a column for each coefficient, for `synthesise` a row.
    """

    cosine: torch.Tensor
    sine: torch.Tensor
    scaling: float
    mean: torch.Tensor
    matrices: torch.Tensor


@dataclass(frozen=True, eq=False)
class Records:
    """The coefficients of a segment, quantized.

    Attributes:
        words: uint8 `[4 · words]`, one token's record after another. A record has the groups in order, a group the
            planes of its integers' bits, in two's complement, from the highest to the lowest. Bit i of a 32-bit
            little-endian word belongs to row i of the group. What integers stand for, `trellis` says.
        escape_index: uint8 `[4 · e]`, 32-bit integers, rising: token · rows + row of each coefficient that is sent as
            it is.
        escape_value: float32 `[e]`.
    """

    words: torch.Tensor
    escape_index: torch.Tensor
    escape_value: torch.Tensor
