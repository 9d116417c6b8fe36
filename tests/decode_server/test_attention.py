import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.attention import HostDecodeMetadata, attend_slots
from spectrumkv.decode_server.kv_pool import KvPool


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one token, written out head by head in float64."""
    outputs = []
    group = query.shape[0] // keys.shape[0]
    for head in range(query.shape[0]):
        logits = keys[head // group].double() @ query[head, 0].double() * scaling
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        tokens = len(logits)
        for token in range(tokens):
            if not kept[token] or (window and tokens - 1 - token >= window):
                logits[token] = -math.inf
        outputs.append(torch.softmax(logits, 0) @ values[head // group].double())
    return torch.stack(outputs).float()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dropped", [[], [1, 2, 9]], ids=["whole", "gaps"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 80), (8, 1, 256)])
def test_each_row_attends_over_its_own_slots(
    softcap: float | None, dropped: list[int], window: int | None, query_heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    geometry = KvGeometry(layers=3, kv_heads=kv_heads, head_dim=head_dim, native_dtype=torch.float32)
    memory = 40 * geometry.layers * geometry.native_bytes_per_token_layer
    pool = KvPool(geometry, memory, torch.device("cpu"), Metrics(CollectorRegistry()))
    # Whatever nobody wrote must not be read.
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    positions, layer = [0, 5, 11], 1
    allocations = [pool.reserve(position + 2) for position in positions]
    for allocation, position in zip(allocations, positions, strict=True):
        allocation.keys(layer, 0, position).normal_()
        allocation.values(layer, 0, position).normal_()
    if dropped:
        allocations[2].drop(layer, torch.tensor(dropped))

    query = torch.randn(3, query_heads, 1, head_dim)
    key, value = torch.randn(2, 3, kv_heads, 1, head_dim)
    module = cast(torch.nn.Module, SimpleNamespace(layer_idx=layer))
    attended, _ = attend_slots(
        module,
        query,
        key,
        value,
        None,
        metadata=HostDecodeMetadata.of(allocations, positions),
        scaling=0.2,
        sliding_window=window,
        softcap=softcap,
    )
    assert attended.shape == (3, 1, query_heads, head_dim)
    for row, (allocation, position) in enumerate(zip(allocations, positions, strict=True)):
        keys = allocation.keys(layer, 0, position + 1)
        values = allocation.values(layer, 0, position + 1)
        assert torch.equal(keys[:, -1], key[row, :, 0])
        assert torch.equal(values[:, -1], value[row, :, 0])
        mask = allocation.keep_mask(layer)
        kept = torch.ones(position + 1, dtype=torch.bool) if mask is None else mask[: position + 1]
        expected = naive(query[row], keys, values, kept, 0.2, window, softcap)
        torch.testing.assert_close(attended[row, 0], expected, rtol=1e-5, atol=1e-5)
    assert pool.keys[0].isnan().all()
    assert pool.keys[2].isnan().all()
