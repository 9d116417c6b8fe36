"""Bodies byte for byte, built by hand from the documented layout in proto/spectrumkv/v1/kv.proto."""

import struct

import numpy as np
import pytest
import torch

from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier

FLOAT32 = KvGeometry(layers=1, kv_heads=2, head_dim=8, native_dtype=torch.float32)


def tier_map(*tiers: Tier) -> torch.Tensor:
    return torch.tensor(tiers, dtype=torch.uint8)


# One KV head of four elements, a token at each tier, in an order that is not the layout's.
TINY_TIERS = tier_map(Tier.INT4, Tier.FP16, Tier.DROP, Tier.INT8)
TINY_KEYS = [[3.5, -1.0, 0.5, -3.5], [1.0, -2.0, 0.25, 65504.0], [9.0, 9.0, 9.0, 9.0], [127.0, -127.0, 1.5, 0.4]]
TINY_VALUES = [[-7.0, 6.0, 2.5, 0.0], [0.0, -0.5, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0], [63.5, 0.25, -0.75, -63.5]]
TINY_BODY = b"".join(
    [
        struct.pack("<4e", 1.0, -2.0, 0.25, 65504.0),  # FP16 keys
        struct.pack("<4e", 0.0, -0.5, 3.0, 4.0),  # FP16 values
        struct.pack("<2e", 127 / 127, 63.5 / 127),  # INT8 scales, keys then values
        struct.pack("<2e", 3.5 / 7, 7 / 7),  # INT4 scales
        struct.pack("<4b", 127, -127, 2, 0),  # INT8 keys, scale 1: 1.5 rounds to the even 2
        struct.pack("<4b", 127, 0, -2, -127),  # INT8 values, scale 0.5: 0.5 rounds to 0, -1.5 to -2
        bytes([0x17, 0x9E]),  # INT4 keys, scale 0.5: codes 7 -2 1 -7; byte 0 pairs 7 with 1, byte 1 -2 with -7
        bytes([0x29, 0x06]),  # INT4 values, scale 1: codes -7 6 2 0; 2.5 rounds to 2
    ]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_absmax_body_is_laid_out_as_documented(dtype: torch.dtype) -> None:
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=4, native_dtype=dtype)
    keys, values = torch.tensor([TINY_KEYS], dtype=dtype), torch.tensor([TINY_VALUES], dtype=dtype)
    body = codecs.get("absmax").encode(keys, values, TINY_TIERS, geometry).body
    assert body.numpy().tobytes().hex(" ") == TINY_BODY.hex(" ")

    received = torch.full((2, 1, 4, 4), torch.nan, dtype=dtype)
    arrived = torch.frombuffer(bytearray(TINY_BODY), dtype=torch.uint8)
    codecs.get("absmax").decode(arrived, TINY_TIERS, received[0], received[1], geometry)
    assert received[:, 0, 0].tolist() == [[3.5, -1.0, 0.5, -3.5], [-7.0, 6.0, 2.0, 0.0]]
    assert received[:, 0, 1].tolist() == [TINY_KEYS[1], TINY_VALUES[1]]
    assert received[:, 0, 2].isnan().all()
    assert received[:, 0, 3].tolist() == [[127.0, -127.0, 2.0, 0.0], [63.5, 0.0, -1.0, -63.5]]


def test_heads_come_before_tokens() -> None:
    # Two heads, three INT8 tokens, every element of a row alike: scales and codes name their row.
    keys = torch.arange(1.0, 7.0).reshape(2, 3, 1).expand(2, 3, 8) * 127
    tiers = tier_map(*[Tier.INT8] * 3)
    body = codecs.get("absmax").encode(keys, -keys, tiers, FLOAT32).body.numpy().tobytes()
    scales = np.array([1, 2, 3, 4, 5, 6] * 2, dtype="<f2").tobytes()
    assert body == scales + bytes([127] * 48) + bytes([129] * 48)


def test_native_body_is_laid_out_as_documented() -> None:
    keys, values = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(3))
    body = codecs.get("native").encode(keys, values, tier_map(*[Tier.NATIVE] * 3), FLOAT32).body
    assert body.numpy().tobytes() == np.stack([keys.numpy(), values.numpy()]).astype("<f4").tobytes()


def test_bfloat16_model_sends_bfloat16_at_the_top_tier() -> None:
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=4, native_dtype=torch.bfloat16)
    keys = torch.tensor([[[1.0, 1e30, -3.0, 0.5]]], dtype=torch.bfloat16)
    body = codecs.get("absmax").encode(keys, keys, tier_map(Tier.FP16), geometry).body
    assert body.numpy().tobytes() == keys.view(torch.int16).numpy().tobytes() * 2
