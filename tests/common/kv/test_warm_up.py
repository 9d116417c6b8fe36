"""What runs at start launches every kernel that a request will, and finds out whether fixed_rate's are right."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import identity_basis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder
from spectrumkv.common.kv.codecs.fixed_rate.coded_layer import CodedLayer, SegmentPlan
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.gpu import slots as gpu_slots
from spectrumkv.common.kv.codecs.fixed_rate.gpu.layers import GpuLayers
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernel_fault, kernels_code
from spectrumkv.common.kv.codecs.fixed_rate.rate import RateControl
from spectrumkv.common.kv.codecs.fixed_rate.self_check import check_decoding, check_encoding
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.warm_up import TRIAL_TOKENS, decode_once, encode_once
from tests.simulated_gpu import GPU, simulated_gpu

GEOMETRY = KvGeometry(layers=1, kv_heads=2, head_dim=16, native_dtype=torch.float16)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that no check has found wrong, as in a process that has just started."""
    monkeypatch.setattr(f"{kernel_fault.__module__}._found", [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_prefill_launches_all_kernels_that_score_place_and_code() -> None:
    with simulated_gpu() as work:
        queries, keys, values = (torch.ones(heads, 8, 16, dtype=torch.float16).to(GPU) for heads in (4, 2, 2))
        encode_once([LayerCapture(queries, keys, values, 0.25, None, None, 0)], GEOMETRY)
    assert kernel_fault() == ""
    kernels = {name for name in work.launches if name.endswith("_kernel")}
    fixed_rate = {"analyse_kernel", "statistics_kernel", "pack_kernel"}
    of_tiers = {"_softmax_kernel", "_scores_kernel", "_place_kernel", "absmax_kernel", "native_kernel"}
    assert kernels == of_tiers | fixed_rate


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_decode_launches_all_kernels_that_write_slots() -> None:
    with simulated_gpu() as work:
        slots = torch.full((2, 2, TRIAL_TOKENS + 9, 16), torch.nan, dtype=torch.float16).to(GPU)
        keys, values = slots[:, :, 3 : 3 + TRIAL_TOKENS]
        decode_once([(keys, values)], GEOMETRY)
        written = slots.cpu()
    assert kernel_fault() == ""
    kernels = {name for name in work.launches if name.endswith("_kernel")}
    assert kernels == {"absmax_kernel", "native_kernel", "unpack_kernel", "synthesise_kernel"}
    assert (written[:, :, 3 : 3 + TRIAL_TOKENS] == 0).all()
    assert written.isnan().sum() == 2 * 2 * 9 * 16


def capture() -> LayerCapture:
    generator = torch.Generator().manual_seed(5)
    queries, keys, values = (torch.randn(heads, 8, 16, generator=generator).half().to(GPU) for heads in (4, 2, 2))
    return LayerCapture(queries, keys, values, 0.25, None, None, 0)


def encoded(seen: LayerCapture) -> list[KvSegment]:
    request = CalibratedRequest(identity_basis(GEOMETRY), GEOMETRY, 8, GEOMETRY.fp16_bytes(8) // 2, "attention", 0)
    return list(FixedRateEncoder(request).encode(seen))


def test_prefill_codes_on_the_cpu_where_a_kernel_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def code(*_: object) -> None:
        raise RuntimeError("ptxas was not found")

    monkeypatch.setattr(GpuLayers, "code", code)
    with simulated_gpu() as work, caplog.at_level(logging.WARNING):
        assert kernels_code(GPU)
        check_encoding([capture()], GEOMETRY)
        assert not kernels_code(GPU)
        check_encoding([capture()], GEOMETRY)
        work.clear()
        [segment] = encoded(capture())
        assert not [name for name in work.launches if name.endswith("_kernel")]
        seen = capture()
        on_cpu = replace(seen, queries=seen.queries.cpu(), keys=seen.keys.cpu(), values=seen.values.cpu())
    assert kernel_fault() == "RuntimeError: ptxas was not found"
    [warning] = caplog.messages
    assert warning == f"codec fixed_rate runs on the CPU, since its kernels fail on this GPU: {kernel_fault()}"
    [expected] = encoded(on_cpu)
    assert torch.equal(segment.body, expected.body)


def test_prefill_codes_on_the_cpu_where_kernels_code_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def code(layers: GpuLayers, seen: LayerCapture, rate: RateControl, plan: SegmentPlan) -> CodedLayer:
        # Values of another token: nothing but a comparison tells.
        keys, values = seen.keys.cpu(), seen.values.cpu().roll(1, dims=1)
        encoder = FixedRateEncoder(layers.request)
        segments = list(encoder.encode(replace(seen, queries=seen.queries.cpu(), keys=keys, values=values, layer=0)))
        segments = [replace(one, layer=seen.layer) for one in segments]
        return CodedLayer(segments, 0, 0)

    monkeypatch.setattr(GpuLayers, "code", code)
    with simulated_gpu():
        check_encoding([capture()], GEOMETRY)
    assert kernel_fault().startswith("a prompt ")
    assert not kernels_code(GPU)


def test_decode_writes_on_the_cpu_where_kernels_write_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    write = gpu_slots.write_segments

    def write_too_little(*received: Any) -> None:
        write(*received)
        for keys, _ in received[3]:
            keys[:, -1] = 0

    monkeypatch.setattr(gpu_slots, "write_segments", write_too_little)
    with simulated_gpu() as work:
        slots = torch.zeros(2, 2, TRIAL_TOKENS, 16, dtype=torch.float16).to(GPU)
        check_decoding([(slots[0], slots[1])], GEOMETRY)
        assert kernel_fault().startswith("slots differ by ")
        work.clear()
        [segment] = encoded(capture())
        decoder = FixedRateDecoder(identity_basis(GEOMETRY), GEOMETRY)
        decoder.decode_all([segment], [(slots[0][:, :8], slots[1][:, :8])])
        assert not [name for name in work.launches if name.endswith("_kernel")]
        assert bool((slots[0][:, 7].cpu() != 0).any())
