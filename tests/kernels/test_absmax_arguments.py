"""What the kernels refuse before they touch memory."""

import pytest
import torch

from spectrumkv.kernels import absmax, absmax_cpu, absmax_reference, absmax_triton
from spectrumkv.kernels.absmax import INT8, CodeFormat

BAD_ARGUMENTS = {
    "float64": ({"states": torch.zeros(1, 4, 8, dtype=torch.float64)}, r"states are torch.float64 \[1, 4, 8\]"),
    "odd head_dim": ({"states": torch.zeros(1, 4, 7)}, r"\[1, 4, 7\].*even head_dim"),
    "two dimensions": ({"states": torch.zeros(4, 8)}, r"\[4, 8\]; they must be \[kv_heads"),
    "int32 index": ({"index": torch.zeros(2, dtype=torch.int32)}, r"index is torch.int32 \[2\] on cpu"),
    "index with two dimensions": ({"index": torch.zeros(2, 1, dtype=torch.int64)}, r"index has shape \[2, 1\]"),
    "too many codes": ({"codes": torch.zeros(1, 3, 8, dtype=torch.int8)}, r"codes is .*\[1, 3, 8\].*\[1, 2, 8\]"),
    "INT4 codes": ({"codes": torch.zeros(1, 2, 4, dtype=torch.uint8)}, r"torch.uint8 \[1, 2, 4\].*torch.int8"),
    "strided codes": (
        {"codes": torch.zeros(1, 2, 16, dtype=torch.int8)[..., ::2]},
        r"codes has strides \(32, 16, 2\)",
    ),
    "float32 scales": ({"scales": torch.zeros(1, 2)}, r"scales is torch.float32 .*torch.float16 \[1, 2\]"),
    "other device": ({"scales": torch.zeros(1, 2, dtype=torch.float16, device="meta")}, r"on meta; .*on cpu"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments_are_refused_with_their_numbers(case: str) -> None:
    wrong, message = BAD_ARGUMENTS[case]
    arguments = {
        "states": torch.zeros(1, 4, 8),
        "index": torch.tensor([0, 2]),
        "codes": torch.zeros(1, 2, 8, dtype=torch.int8),
        "scales": torch.zeros(1, 2, dtype=torch.float16),
        **wrong,
    }
    for implementation in (absmax, absmax_cpu, absmax_reference, absmax_triton):
        with pytest.raises(ValueError, match=message):
            implementation.quantize(**arguments, form=INT8)
        with pytest.raises(ValueError, match=message):
            implementation.dequantize(**arguments, form=INT8)


def test_a_position_outside_is_refused_on_a_cpu() -> None:
    states = torch.zeros(1, 4, 8)
    codes, scales = torch.zeros(1, 1, 8, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.float16)
    outside = torch.tensor([4])
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        absmax.quantize(states, outside, codes, scales, INT8)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        absmax.dequantize(codes, scales, outside, states, INT8)


def test_only_the_two_formats_exist() -> None:
    with pytest.raises(ValueError, match="4-bit codes up to 8"):
        CodeFormat(bits=4, largest=8)
