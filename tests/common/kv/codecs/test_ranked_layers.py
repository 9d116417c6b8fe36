"""Layers that a GPU ranks, places and codes by itself, against those of a CPU, on a GPU that is real."""

import pytest
import torch

from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs import absmax, segmentation
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.geometry import NATIVE_DTYPES, KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.segment import KvSegment

TOKENS = 4099


def coded(policy: str, budget: float, dtype: torch.dtype, device: str) -> list[KvSegment]:
    """The segments of a layer whose scores are drawn, which makes them the same on every device."""
    geometry = KvGeometry(layers=1, kv_heads=8, head_dim=128, native_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 8, TOKENS, 128, generator=generator).to(dtype).to(device)
    request = EncoderRequest(
        policy=policies.get(policy),
        budget=policies.get(policy).budget(budget),
        scorer="random",
        scope="layer",
        int4=Int4Layers(),
        seed=5,
        geometry=geometry,
        tokens=TOKENS,
    )
    capture = LayerCapture(keys[:, -1:], keys, values, 0.1, None, None, 0)
    return list(codecs.get("absmax").encoder(request).encode(capture))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("body_bytes", [9000, segmentation.MAX_BODY_BYTES])
@pytest.mark.parametrize(("policy", "budget"), [("adaptive", 0.3), ("adaptive", 0.2), ("sink-protect", 0.6)])
def test_a_gpu_ranks_cuts_and_codes_as_a_cpu_does(
    policy: str, budget: float, body_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (absmax, segmentation):
        monkeypatch.setattr(module, "MAX_BODY_BYTES", body_bytes)
    on_gpu, on_cpu = (coded(policy, budget, dtype, device) for device in ("cuda", "cpu"))
    assert len(on_gpu) == len(on_cpu) > 1
    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        assert actual.header == expected.header
        assert torch.equal(actual.body, expected.body)
        assert actual.tier_bytes == expected.tier_bytes
