"""Segments into slots by kernels in Triton, against records and transforms in plain torch; slots held NaN."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis
from spectrumkv.common.kv.codecs.fixed_rate.gpu.slots import write_segments
from spectrumkv.common.kv.codecs.fixed_rate.received import ReceivedBody, read_body
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.kernels.fixed_rate import reference
from spectrumkv.kernels.fixed_rate.triton.decoding import decode
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry, plain_states
from tests.kernels.absmax.states import DEVICE

LAYERS, BEFORE, AFTER = 3, 3, 2


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def coded(
    shape: KvGeometry, basis: CalibratedBasis, tokens: int, budget: float, size: int, magnitude: float = 1.0
) -> list[KvSegment]:
    """Segments of a prompt, made on a CPU, of at most so many tokens."""
    segment_bytes = int(budget * shape.fp16_bytes(tokens))
    encoder = FixedRateEncoder(CalibratedRequest(basis, shape, tokens, segment_bytes, "attention", 0))
    encoder._segment_tokens = size
    segments = []
    for layer in range(shape.layers):
        seen = capture(basis, layer, tokens)
        # Some coefficients escape.
        noise = torch.randn(seen.keys.shape, generator=torch.Generator().manual_seed(4)).exp() * magnitude
        keys, values = ((one * noise).to(shape.native_dtype) for one in (seen.keys, seen.values))
        segments += encoder.encode(replace(seen, keys=keys, values=values, queries=seen.queries.to(keys.dtype)))
    return segments


def plain(shape: KvGeometry, basis: CalibratedBasis, segment: KvSegment, body: ReceivedBody) -> torch.Tensor:
    """Keys and values of a segment: float64 `[2, kv_heads, n, d]`."""
    tokens, sinks, coded = segment.tiers.numel(), body.sinks, body.coded
    states = torch.empty(2, shape.kv_heads, tokens, shape.head_dim, dtype=torch.float64)
    exact = body.body[HEADER.size :][: shape.fp16_bytes_per_layer(sinks)]
    states[:, :, :sinks] = exact.clone().view(shape.half_dtype).view(states[:, :, :sinks].shape).double()
    if coded is not None:
        found = reference.unpack(coded.records, coded.scales, coded.tokens, coded.layout)
        heads = found.view(tokens - sinks, 2, shape.kv_heads, shape.head_dim).permute(1, 2, 0, 3)
        states[:, :, sinks:] = plain_states(basis, segment.layer, heads.double(), segment.first_token + sinks)
    return states


def assert_decoded(
    shape: KvGeometry, tokens: int, budget: float, size: int, chosen: slice = slice(None), magnitude: float = 1.0
) -> int:
    """Decode some segments of a prompt together; return how many escapes they have."""
    basis = basis_of(shape)
    segments = coded(shape, basis, tokens, budget, size, magnitude)[chosen]
    transforms = LayerTransform.of_layers(basis)
    bodies = [read_body(transforms[one.layer], one.body, one.tiers.numel(), shape) for one in segments]
    room = BEFORE + tokens + AFTER
    cache = torch.full((2, shape.layers, shape.kv_heads, room, shape.head_dim), torch.nan, dtype=shape.native_dtype)
    wanted = cache.double()
    for one, body in zip(segments, bodies, strict=True):
        span = slice(BEFORE + one.first_token, BEFORE + one.first_token + one.tiers.numel())
        wanted[:, one.layer, :, span] = plain(shape, basis, one, body)
    on_device = cache.to(DEVICE)
    there = []
    for one in segments:
        of_layer = on_device[:, one.layer, :, BEFORE + one.first_token :][:, :, : one.tiers.numel()]
        there.append((of_layer[0], of_layer[1]))
    write_segments(DeviceBasis(basis, DEVICE), segments, bodies, there)
    cache = on_device.cpu()
    half = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[shape.native_dtype]
    largest = torch.finfo(shape.native_dtype).max
    scale = float(wanted.nan_to_num(0.0).abs().max())
    torch.testing.assert_close(
        cache.double(), wanted.clamp(-largest, largest), rtol=half + 1e-5, atol=1e-6 * scale, equal_nan=True
    )
    return sum(body.coded.records.escape_value.numel() for body in bodies if body.coded is not None)


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "tokens", "budget", "size", "dtype"),
    [
        (1, 6, 1, 0.5, 4, torch.float32),
        (1, 6, 3, 9.0, 4, torch.float32),
        (2, 16, 11, 0.5, 7, torch.float16),
        (1, 80, 6, 0.4, 8, torch.bfloat16),
        (2, 20, 9, 0.3, 3, torch.float32),
    ],
)
def test_a_message_is_written_as_plain_torch_would(
    kv_heads: int, head_dim: int, tokens: int, budget: float, size: int, dtype: torch.dtype
) -> None:
    shape = replace(geometry(kv_heads, head_dim, LAYERS), native_dtype=dtype)
    assert_decoded(shape, tokens, budget, size)


def test_some_segments_of_a_prompt_leave_the_slots_of_others_alone() -> None:
    assert_decoded(geometry(2, 16, LAYERS), 12, 0.4, 5, slice(1, 9, 3))


def test_many_tokens_are_written_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_COEFFICIENTS", 7 * 64)
    monkeypatch.setattr(decode, "tile_of", lambda head_dim: (4, 16))
    assert_decoded(geometry(2, 16, 2), 12, 0.4, 9)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "head_dim", "tokens"), [(3, 64, 150), (8, 128, 40), (1, 256, 40)])
def test_larger_messages_are_written_as_plain_torch_would(kv_heads: int, head_dim: int, tokens: int) -> None:
    escapes = assert_decoded(geometry(kv_heads, head_dim, LAYERS), tokens, 0.3, 64)
    assert escapes > 0


def test_what_was_near_the_greatest_float16_comes_back_finite() -> None:
    shape = replace(geometry(1, 6, 1), native_dtype=torch.float16)
    basis = basis_of(shape)
    seen = capture(basis, 0, 9)
    keys = (seen.keys.sign() * 65504.0).half()
    encoder = FixedRateEncoder(CalibratedRequest(basis, shape, 9, int(0.3 * shape.fp16_bytes(9)), "position", 0))
    [segment] = encoder.encode(replace(seen, keys=keys, values=keys, queries=seen.queries.half() * 0))
    body = read_body(LayerTransform.of_layers(basis)[0], segment.body, 9, shape)
    received = torch.full((2, 1, 9, 6), torch.nan, dtype=torch.float16, device=DEVICE)
    write_segments(DeviceBasis(basis, DEVICE), [segment], [body], [(received[0], received[1])])
    assert received.isfinite().all()
    assert bool((received.abs() == 65504.0).any())
