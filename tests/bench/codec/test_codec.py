"""The codec bench: what is measured, and that what it times does the work."""

import json
from pathlib import Path

import pytest
import torch

from spectrumkv.bench.codec.measure import measure
from spectrumkv.bench.codec.under_test import (
    MIXED,
    QuantoCodec,
    RegisteredCodec,
    add_ratios_to_quanto,
    kernels_under_test,
    quantizers,
    registered_codecs,
)
from spectrumkv.bench.main import main
from spectrumkv.bench.models.synthetic_prompt import SyntheticCache
from spectrumkv.common.kv.codecs.tiered import tier_codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier

# Head dimension and tokens that no power of two hides behind.
GEOMETRY = KvGeometry(layers=2, kv_heads=3, head_dim=10, native_dtype=torch.float32)
# Half a step of INT4 at the largest magnitude that 90 normal draws are likely to have, and something on top.
TOLERANCE = 0.5


@pytest.fixture(scope="module")
def cache() -> SyntheticCache:
    return SyntheticCache.random(GEOMETRY, 37, torch.device("cpu"))


def one_at_a_time(cache: SyntheticCache) -> list[RegisteredCodec]:
    return [one for one in registered_codecs(cache) if isinstance(one, RegisteredCodec)]


def test_every_codec_is_measured_at_every_tier(cache: SyntheticCache) -> None:
    measured = {(one.codec, one.tier) for one in registered_codecs(cache)}
    for name, codec in tier_codecs().items():
        tiers = codec.tiers - {Tier.DROP}
        assert {(name, tier.label) for tier in tiers} <= measured
        assert ((name, MIXED) in measured) == (len(tiers) > 1)


def test_what_is_timed_writes_every_slot(cache: SyntheticCache) -> None:
    for one in one_at_a_time(cache):
        for slots in one.slots:
            slots.fill_(torch.nan)
        one.encode()
        one.decode()
        for layer in range(GEOMETRY.layers):
            keys, values = one.slots[2 * layer : 2 * layer + 2]
            torch.testing.assert_close(keys, cache.keys[layer], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(values, cache.values[layer], atol=TOLERANCE, rtol=0)


def test_caches_lie_in_memory_as_models_leave_them(cache: SyntheticCache) -> None:
    assert cache.keys[0].shape == (3, 37, 10)
    assert cache.keys[0].stride() == (10, 30, 1)


def test_rates_and_ratios_belong_together(cache: SyntheticCache) -> None:
    rows = measure(cache, [*registered_codecs(cache), *kernels_under_test(cache)], 2, lambda done: None)
    for row in rows:
        for direction in ("encode", "decode"):
            assert row[f"{direction}_gbps"] > 0
            assert row[f"{direction}_ratio"] == pytest.approx(row[f"{direction}_gbps"] / row["memcpy_gbps"])
    assert {row["memcpy_gbps"] for row in rows} == {rows[0]["memcpy_gbps"]}


def test_ratios_to_quanto_are_by_tier() -> None:
    rows = [
        {"codec": "absmax", "tier": "int4", "encode_gbps": 6.0, "decode_gbps": 8.0},
        {"codec": "absmax", "tier": "fp16", "encode_gbps": 6.0, "decode_gbps": 8.0},
        {"codec": "quanto", "tier": "int4", "encode_gbps": 2.0, "decode_gbps": 4.0},
    ]
    add_ratios_to_quanto(rows)
    assert [row["encode_ratio_to_quanto"] for row in rows] == [3.0, None, 1.0]
    assert [row["decode_ratio_to_quanto"] for row in rows] == [2.0, None, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("tier", [Tier.INT4, Tier.INT8])
def test_quanto_does_the_same_work(tier: Tier) -> None:
    pytest.importorskip("optimum.quanto")
    cache = SyntheticCache.random(KvGeometry(1, 1, 64, torch.float32), 64, torch.device("cpu"))
    coded = quantizers[tier](cache.keys[0])
    torch.testing.assert_close(coded.dequantize().view(cache.keys[0].shape), cache.keys[0], atol=TOLERANCE, rtol=0)
    QuantoCodec(tier, cache).encode()


@pytest.mark.slow
def test_the_command_writes_rows(tmp_path: Path) -> None:
    result = tmp_path / "codec.json"
    shape = ("--tokens", "64", "--layers", "2", "--dtype", "bfloat16")
    assert main(["codec", *shape, "--rounds", "1", "--json", str(result)]) == 0
    content = json.loads(result.read_text())
    assert content["meta"]["args"]["tokens"] == 64
    assert content["meta"]["load_average_before"] >= 0
    keys = ["device", "dtype", "tier", "encode_gbps", "decode_gbps", "memcpy_gbps", "encode_ratio", "decode_ratio"]
    assert all(set(keys) <= set(row) for row in content["rows"])
    assert {row["dtype"] for row in content["rows"]} == {"bfloat16"}


@pytest.mark.parametrize(("flag", "value"), [("--tokens", "0"), ("--head-dim", "63"), ("--rounds", "0")])
def test_senseless_shapes_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codec", "--tokens", "8", "--layers", "1", flag, value]) == 1
    assert "INVALID_ARGUMENT" in capsys.readouterr().err
