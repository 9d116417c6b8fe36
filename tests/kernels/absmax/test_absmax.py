"""All implementations, side by side; Triton runs under its interpreter where there is no GPU."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.kernels import absmax
from spectrumkv.kernels.absmax import INT4, INT8, CodeFormat
from spectrumkv.kernels.absmax import cpu as absmax_cpu
from spectrumkv.kernels.absmax import reference as absmax_reference
from spectrumkv.kernels.absmax import triton as absmax_triton
from tests.kernels.absmax.states import DEVICE, DTYPES, LAYOUTS, dequantize, quantized, random_states, strided

FORMATS = [pytest.param(INT8, id="int8"), pytest.param(INT4, id="int4")]
IMPLEMENTATIONS = [pytest.param(absmax_reference, id="reference"), pytest.param(absmax_triton, id="triton")]
if DEVICE.type == "cpu":
    IMPLEMENTATIONS.append(pytest.param(absmax_cpu, id="cpu"))
# What must agree with the reference.
KERNELS = IMPLEMENTATIONS[1:]
# Where a float16 scale is subnormal, rounding it moves it by up to this much.
SUBNORMAL_ROUNDING = 2.0**-25


def assert_agrees(implementation: ModuleType, states: torch.Tensor, form: CodeFormat) -> None:
    codes, scales = quantized(absmax_reference, states, form)
    its_codes, its_scales = quantized(implementation, states, form)
    assert torch.equal(its_scales, scales)
    assert torch.equal(its_codes, codes)
    expected, actual = torch.full_like(states, torch.nan), torch.full_like(states, torch.nan)
    dequantize(absmax_reference, codes, scales, expected, form)
    dequantize(implementation, codes, scales, actual, form)
    # The product is exact in float32 and rounded once, so not even the last bit may differ.
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 3, 17, 65])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_kernels_agree_with_the_reference(
    implementation: ModuleType, form: CodeFormat, kv_heads: int, tokens: int, head_dim: int
) -> None:
    states = random_states(kv_heads, tokens, head_dim, torch.float32, seed=head_dim + tokens)
    assert_agrees(implementation, states, form)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_in_every_dtype(implementation: ModuleType, form: CodeFormat, dtype: torch.dtype) -> None:
    assert_agrees(implementation, random_states(3, 33, 96, dtype), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_make_no_difference(form: CodeFormat, layout: str, implementation: ModuleType) -> None:
    states = random_states(3, 17, 64, torch.bfloat16)
    source = strided((3, 17, 64), torch.bfloat16, layout)
    source.copy_(states)
    codes, scales = quantized(absmax_reference, states, form)
    for actual, expected in zip(quantized(implementation, source, form), (codes, scales), strict=True):
        assert torch.equal(actual, expected)
    target = strided((3, 17, 64), torch.bfloat16, layout)
    dequantize(implementation, codes, scales, target, form)
    expected_states = torch.full((3, 17, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    dequantize(absmax_reference, codes, scales, expected_states, form)
    assert torch.equal(target, expected_states)
    if layout == "slots":
        assert target._base is not None
        assert target._base.isfinite().sum() == target.numel(), "a row outside the view was written"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_worked_example(implementation: ModuleType) -> None:
    # absmax 127 makes the INT8 scale 1, absmax 7 the INT4 scale 1: codes are the elements, rounded.
    states = torch.tensor([[[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.4]]], device=DEVICE)
    codes, scales = quantized(implementation, states, INT8)
    assert codes.tolist() == [[[127, -127, 0, 2, 2, 0, -2, 126]]]
    assert scales.tolist() == [[1.0]]
    states = torch.tensor([[[7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -1.6, -3.0]]], device=DEVICE)
    codes, scales = quantized(implementation, states, INT4)
    # 7 and 2, -7 and 0, 0 and -2, 2 and -3: the second of each pair in the high nibble.
    assert codes.tolist() == [[[0x27, 0x09, 0xE0, 0xD2]]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 9e6], ids=str)
@pytest.mark.parametrize("element", [0, 40, 63])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_what_cannot_be_quantized_shows_in_its_scale(
    form: CodeFormat, implementation: ModuleType, poison: float, element: int
) -> None:
    states = torch.ones(1, 3, 64, device=DEVICE)
    states[0, 1, element] = poison
    _, scales = quantized(implementation, states, form)
    assert scales.isfinite().tolist() == [[True, False, True]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_largest_float16_comes_back_finite(form: CodeFormat, implementation: ModuleType) -> None:
    # 65504 / 127 rounds up to 516, and 127 · 516 = 65532 is infinite in float16.
    states = torch.full((1, 1, 64), 65504.0, dtype=torch.float16, device=DEVICE)
    codes, scales = quantized(implementation, states, form)
    assert form.largest * scales.float().item() >= 65520
    dequantize(implementation, codes, scales, states, form)
    assert (states == 65504).all()


@given(
    form=st.sampled_from([INT8, INT4]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 12),
    seed=st.integers(0, 2**16),
)
def test_roundtrip_error_is_bounded(form: CodeFormat, dtype: torch.dtype, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(2, 7, 16, generator=generator) * 2.0**exponent).to(dtype)
    codes, scales = quantized(absmax_reference, states, form)
    restored = torch.empty_like(states)
    dequantize(absmax_reference, codes, scales, restored, form)
    exact = states.double()
    scale = scales.double().unsqueeze(-1)
    # Half a step, or what the rounding of a subnormal scale takes off the largest codes; then the division's
    # rounding to float32 (at most 2^-24 of a code), and the output's rounding (half an ulp; a subnormal one
    # in float16).
    coding = torch.maximum(scale / 2, torch.tensor(form.largest * SUBNORMAL_ROUNDING, dtype=torch.float64))
    division = scale * form.largest * 2.0**-24
    info = torch.finfo(dtype)
    output = torch.maximum((exact.abs() + coding) * info.eps / 2, torch.tensor(info.tiny * info.eps / 2))
    assert ((restored.double() - exact).abs() <= coding + division + output).all()
    normal = scales >= torch.finfo(torch.float16).tiny
    assert ((restored.double() - exact).abs() <= scale / 2 + division + output)[normal].all()


@given(seed=st.integers(0, 2**16), form=st.sampled_from([INT8, INT4]))
def test_codes_keep_to_their_range(seed: int, form: CodeFormat) -> None:
    # Subnormal scales, rounded down, are where codes would leave it.
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 16, 32, generator=generator) * 2.0**-20
    codes, scales = quantized(absmax_reference, states, form)
    if form == INT4:
        nibbles = torch.cat((codes & 0xF, codes >> 4), dim=-1).to(torch.int8)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    assert codes.abs().max() <= form.largest
    assert (codes[scales == 0] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_too_small_for_any_scale_is_zero(implementation: ModuleType) -> None:
    states = torch.full((1, 1, 64), 127 * SUBNORMAL_ROUNDING, device=DEVICE)
    codes, scales = quantized(implementation, states, INT8)
    assert scales.item() == 0
    assert not codes.any()


@pytest.mark.parametrize("form", FORMATS)
def test_codes_of_a_cpu_equal_the_reference_in_every_range(form: CodeFormat) -> None:
    # From scales that are zero over subnormal ones to those that overflow.
    exponents = torch.arange(-40, 24).repeat_interleave(16)
    states = torch.randn(1, exponents.numel(), 64, generator=torch.Generator().manual_seed(3))
    states = (states * (2.0**exponents).unsqueeze(-1)).contiguous()
    codes, scales = quantized(absmax_reference, states, form)
    its_codes, its_scales = quantized(absmax_cpu, states, form)
    assert torch.equal(its_scales, scales)
    usable = scales.isfinite()
    assert 0 < usable.sum() < usable.numel()
    assert torch.equal(its_codes[usable], codes[usable])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_codes_equal_those_of_the_cpu(form: CodeFormat, dtype: torch.dtype) -> None:
    states = random_states(8, 4099, 128, dtype).cuda()
    codes, scales = quantized(absmax, states, form)
    cpu_codes, cpu_scales = quantized(absmax, states.cpu(), form)
    assert torch.equal(codes.cpu(), cpu_codes)
    assert torch.equal(scales.cpu(), cpu_scales)
    restored, cpu_restored = torch.full_like(states, torch.nan), torch.full_like(states.cpu(), torch.nan)
    dequantize(absmax, codes, scales, restored, form)
    dequantize(absmax, cpu_codes, cpu_scales, cpu_restored, form)
    assert torch.equal(restored.cpu(), cpu_restored)


def test_only_the_two_formats_exist() -> None:
    with pytest.raises(ValueError, match="4-bit codes up to 8"):
        CodeFormat(bits=4, largest=8)
