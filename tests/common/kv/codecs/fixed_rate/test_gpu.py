"""Codec fixed_rate on a GPU that is none: what it asks of it, and that a CPU sends and reads the same."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate import coded_layer
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.gpu import layers as gpu_layers
from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import device_basis
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.kernels.fixed_rate.triton.tables import quantizer_tables
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry
from tests.simulated_gpu import GPU, GpuWork, simulated_gpu

LAYERS = 2
# Scores take two launches; coefficients, statistics and records one each; and the bytes come to the host in one copy.
LAUNCHES, WAITS = 6, 1
# Another attempt at the last layer: steps go there, records are written, bytes come back.
ATTEMPT_LAUNCHES = 3


def encoder_of(basis: CalibratedBasis, shape: KvGeometry, tokens: int, scorer: str = "attention") -> FixedRateEncoder:
    return FixedRateEncoder(CalibratedRequest(basis, shape, tokens, int(0.5 * shape.fp16_bytes(tokens)), scorer, 0))


def on_gpu(seen: LayerCapture) -> LayerCapture:
    return replace(seen, queries=seen.queries.to(GPU), keys=seen.keys.to(GPU), values=seen.values.to(GPU))


def captures(basis: CalibratedBasis, tokens: int, dtype: torch.dtype, layers: int = LAYERS) -> Iterator[LayerCapture]:
    for layer in range(layers):
        seen = capture(basis, layer, tokens)
        yield replace(seen, queries=seen.queries.to(dtype), keys=seen.keys.to(dtype), values=seen.values.to(dtype))


def coded(
    basis: CalibratedBasis, shape: KvGeometry, tokens: int, layers: int = 1, scorer: str = "attention"
) -> tuple[list[list[KvSegment]], list[GpuWork]]:
    """The segments of the first layers, and what each asked of a GPU that knows the basis."""
    encoder, segments, asked = encoder_of(basis, shape, tokens, scorer), [], []
    with simulated_gpu() as work:
        quantizer_tables(GPU)
        for number, seen in enumerate(captures(basis, tokens, shape.native_dtype, layers)):
            device_basis(basis, GPU).analysis(number)
            device_basis(basis, GPU).angles(tokens)
            device_basis(basis, GPU).gain_scales(encoder.gain_level)
            there = on_gpu(seen)
            work.clear()
            segments.append(list(encoder.encode(there)))
            asked.append(GpuWork(list(work.launches), list(work.waits)))
    return segments, asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_costs_six_launches_and_a_wait_and_is_what_a_cpu_sends(dtype: torch.dtype) -> None:
    shape, tokens = replace(geometry(1, 6, LAYERS), native_dtype=dtype), 13
    basis = basis_of(shape)
    [[found]], [asked] = coded(basis, shape, tokens)
    assert len(asked.launches) == LAUNCHES, asked.launches
    assert len(asked.waits) == WAITS, asked.waits
    [wanted] = encoder_of(basis, shape, tokens).encode(next(captures(basis, tokens, dtype)))
    # Sums differ in their last bits, and seldom what is rounded.
    assert found.body.numel() == wanted.body.numel()
    assert float((found.body == wanted.body).double().mean()) > 0.98
    assert found.tiers.tolist() == wanted.tiers.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [9, 26])
def test_the_last_layer_is_coded_until_it_fits(tokens: int) -> None:
    shape = geometry(2, 16, LAYERS)
    basis = basis_of(shape)
    segments, asked = coded(basis, shape, tokens, LAYERS)
    attempts = len(asked[-1].waits) - WAITS
    assert len(asked[-1].launches) == LAUNCHES + attempts * ATTEMPT_LAUNCHES
    taken = sum(one.wire_bytes for of_layer in segments for one in of_layer)
    assert 0.99 * 0.5 <= taken / shape.fp16_bytes(tokens) <= 0.5


def test_a_message_costs_three_launches_and_no_wait_and_a_cpu_reads_the_same() -> None:
    shape, tokens = geometry(1, 6, LAYERS), 11
    basis = basis_of(shape)
    encoder = encoder_of(basis, shape, tokens)
    encoder._segment_tokens = 6
    segments = [one for seen in captures(basis, tokens, torch.float32) for one in encoder.encode(seen)]
    decoder = FixedRateDecoder(basis, shape)
    states = []
    with simulated_gpu() as work:
        for device in (torch.device("cpu"), GPU):
            cache = torch.full((LAYERS, 2, 1, tokens, 6), torch.nan).to(device)
            for _ in range(2):
                slots = []
                for one in segments:
                    span = slice(one.first_token, one.first_token + one.tiers.numel())
                    slots.append((cache[one.layer, 0, :, span], cache[one.layer, 1, :, span]))
                work.clear()
                shares = decoder.decode_all(segments, slots)
                assert shares == [one.tier_bytes for one in segments]
            if device == GPU:
                # The copy, records and states.
                assert len(work.launches) == 3, work.launches
                assert not work.waits
            states.append(cache.cpu())
    assert len(segments) == 2 * LAYERS
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


def test_other_scorers_rank_without_a_wait() -> None:
    shape = geometry(1, 6, LAYERS)
    basis = basis_of(shape)
    _, asked = coded(basis, shape, 5, scorer="key_norm")
    assert len(asked[0].waits) == WAITS


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("side", "token", "value", "error", "text"),
    [
        ("queries", 0, torch.nan, NotFiniteError, "keys or queries of layer 0"),
        ("values", 4, torch.inf, NotFiniteError, "keys or values of layer 0 are infinite"),
        ("values", 0, -torch.inf, NotFiniteError, "keys or values of layer 0 are infinite"),
        ("values", 0, 1e6, InvalidArgumentError, "first tokens for torch.float16"),
        ("values", 4, 1e25, InvalidArgumentError, "layer 0 are too large"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    side: str, token: int, value: float, error: type[Exception], text: str
) -> None:
    shape = geometry(1, 6, 1)
    basis = basis_of(shape)
    seen = capture(basis, 0, 6)
    getattr(seen, side)[0, token, 2] = value
    encoder = FixedRateEncoder(CalibratedRequest(basis, shape, 6, int(2 * shape.fp16_bytes(6)), "attention", 0))
    with simulated_gpu(), pytest.raises(error, match=text):
        list(encoder.encode(on_gpu(seen)))


@pytest.mark.slow
def test_a_body_that_had_no_room_is_coded_again_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = geometry(1, 6, LAYERS)
    basis = basis_of(shape)
    wanted, _ = coded(basis, shape, 12)
    monkeypatch.setattr(gpu_layers, "ROOM", 0.0)
    monkeypatch.setattr(gpu_layers, "SPARE_BYTES", HEADER.size + 16)
    found, asked = coded(basis, shape, 12)
    assert len(asked[0].waits) == 2 * WAITS
    assert torch.equal(found[0][0].body, wanted[0][0].body)


def test_a_layer_that_takes_more_than_a_chunk_is_cut_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu_layers, coded_layer):
        monkeypatch.setattr(module, "MAX_CHUNK_PAYLOAD_BYTES", 256)
    shape, tokens = geometry(1, 16, LAYERS), 12
    basis = basis_of(shape)
    [segments], _ = coded(basis, shape, tokens)
    assert len(segments) > 1
    assert sum(one.tiers.numel() for one in segments) == tokens
    assert all(one.wire_bytes <= 256 for one in segments)
