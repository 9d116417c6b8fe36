"""Every codec that writes the tiers of policies: what comes back, and what is refused."""

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import DataLossError, InternalError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.codecs.tiered import tier_codecs
from spectrumkv.common.kv.geometry import NATIVE_DTYPES, KvGeometry
from spectrumkv.common.kv.tiers import Tier
from tests.simulated_gpu import GPU, simulated_gpu

CODECS = tier_codecs()
GEOMETRIES = [
    pytest.param(KvGeometry(layers=2, kv_heads=heads, head_dim=head_dim, native_dtype=dtype), id=name)
    for heads, head_dim, dtype, name in [
        (3, 64, torch.float32, "float32"),
        (1, 80, torch.float16, "float16"),
        (2, 96, torch.bfloat16, "bfloat16"),
    ]
]
FLOAT32 = KvGeometry(layers=1, kv_heads=2, head_dim=8, native_dtype=torch.float32)
FLOAT16_MAX = 65504.0
# Relative to its scale, how far a coded element may be off: half a step, and a little for the division in
# float32.
HALF_STEP = 0.5 + 1e-4
# Relative to the element, what rounding to its dtype adds: half an ulp of the received element, which is at
# most twice the sent one.
OUTPUT_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def tier_map(*tiers: Tier) -> torch.Tensor:
    return torch.tensor(tiers, dtype=torch.uint8)


def draw_states(geometry: KvGeometry, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `tokens` tokens, as slices of something larger."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, tokens + 3, geometry.kv_heads, geometry.head_dim, generator=generator)
    keys, values = (3 * both[:, 2 : 2 + tokens]).transpose(1, 2).to(geometry.native_dtype)
    return keys, values


def poisoned_slots(geometry: KvGeometry, tokens: int) -> torch.Tensor:
    """Keys and values `[2, kv_heads, tokens, head_dim]`, NaN throughout, a view of larger slots."""
    shape = (2, geometry.kv_heads, tokens + 5, geometry.head_dim)
    return torch.full(shape, torch.nan, dtype=geometry.native_dtype)[:, :, 5:]


def largest_error_allowed(states: torch.Tensor, tier: Tier) -> torch.Tensor:
    """Bound on |received - sent|, element by element."""
    exact = states.double()
    if tier == Tier.NATIVE:
        return torch.zeros_like(exact)
    if tier == Tier.FP16:
        # Half an ulp of float16, a subnormal one's at least; exact where the model's dtype has 16 bits.
        return (exact.abs() * 2.0**-11).clamp(min=2.0**-25) * (states.dtype == torch.float32)
    largest = {Tier.INT8: 127, Tier.INT4: 7}[tier]
    scale = (exact.abs().amax(-1, keepdim=True) / largest).half().double()
    return HALF_STEP * scale + exact.abs() * OUTPUT_ROUNDING[states.dtype]


def body_of(codec_name: str, geometry: KvGeometry, tiers: torch.Tensor, seed: int = 0) -> torch.Tensor:
    keys, values = draw_states(geometry, tiers.numel(), seed)
    return CODECS[codec_name].encode(keys, values, tiers, geometry).body


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@given(data=st.data())
def test_every_token_comes_back_within_its_tier(name: str, geometry: KvGeometry, data: st.DataObject) -> None:
    codec = CODECS[name]
    tiers = tier_map(*data.draw(st.lists(st.sampled_from(sorted(codec.tiers)), min_size=1, max_size=40)))
    keys, values = draw_states(geometry, tiers.numel(), seed=data.draw(st.integers(0, 2**16)))
    encoded = codec.encode(keys, values, tiers, geometry)
    assert encoded.body.dtype == torch.uint8
    assert encoded.body.numel() % 2 == 0
    assert sum(encoded.tier_bytes.values()) == encoded.body.numel()

    body = encoded.body.clone()
    slots = poisoned_slots(geometry, tiers.numel())
    counted = codec.decode(body, tiers, slots[0], slots[1], geometry)
    assert counted == encoded.tier_bytes
    assert torch.equal(body, encoded.body), "decode wrote to its body"
    for sent, received in ((keys, slots[0]), (values, slots[1])):
        for token, tier in enumerate(tiers.tolist()):
            if tier == Tier.DROP:
                assert received[:, token].isnan().all()
                continue
            error = (received[:, token].double() - sent[:, token].double()).abs()
            assert (error <= largest_error_allowed(sent[:, token], Tier(tier))).all()
    assert slots._base is not None
    assert slots._base[:, :, :5].isnan().all(), "decode wrote before its view"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_native_is_bit_for_bit(geometry: KvGeometry) -> None:
    keys, values = draw_states(geometry, 17, seed=1)
    tiers = tier_map(*[Tier.NATIVE] * 17)
    encoded = CODECS["native"].encode(keys, values, tiers, geometry)
    slots = poisoned_slots(geometry, 17)
    CODECS["native"].decode(encoded.body, tiers, slots[0], slots[1], geometry)
    assert torch.equal(slots[0], keys)
    assert torch.equal(slots[1], values)
    assert encoded.tier_bytes == {Tier.NATIVE: 17 * geometry.native_bytes_per_token_layer}


def test_tier_bytes_are_codes_and_scales() -> None:
    tiers = tier_map(Tier.FP16, Tier.INT4, Tier.DROP, Tier.INT8, Tier.INT4, Tier.INT4)
    keys, values = draw_states(FLOAT32, 6, seed=2)
    encoded = CODECS["absmax"].encode(keys, values, tiers, FLOAT32)
    # Two sides and two heads of eight elements; a scale takes two bytes.
    assert encoded.tier_bytes == {
        Tier.DROP: 0,
        Tier.INT4: 3 * 2 * 2 * (4 + 2),
        Tier.INT8: 1 * 2 * 2 * (8 + 2),
        Tier.FP16: 1 * 2 * 2 * 16,
    }


def test_dropped_tokens_take_no_bytes() -> None:
    tiers = tier_map(*[Tier.DROP] * 9)
    body = body_of("absmax", FLOAT32, tiers)
    slots = poisoned_slots(FLOAT32, 9)
    CODECS["absmax"].decode(body, tiers, slots[0], slots[1], FLOAT32)
    assert body.numel() == 0
    assert slots.isnan().all()


@pytest.mark.parametrize("name", CODECS)
def test_a_body_of_another_length_is_refused(name: str) -> None:
    codec = CODECS[name]
    tiers = tier_map(*sorted(codec.tiers), *sorted(codec.tiers))
    body = body_of(name, FLOAT32, tiers)
    slots = poisoned_slots(FLOAT32, tiers.numel())
    for wrong in (body[:-2], body[:-1], body[:0], torch.cat((body, body[:2]))):
        with pytest.raises(DataLossError, match=f"{wrong.numel()} bytes.*{body.numel()}") as refusal:
            codec.decode(wrong, tiers, slots[0], slots[1], FLOAT32)
        assert refusal.value.reason == "length"
    assert slots.isnan().all(), "a refused body was written into the slots"


@pytest.mark.parametrize("tier", [Tier.INT8, Tier.INT4])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", range(4))
def test_a_scale_that_is_not_finite_is_refused(tier: Tier, scale: float, position: int) -> None:
    tiers = tier_map(tier)
    body = body_of("absmax", FLOAT32, tiers)
    body[2 * position : 2 * position + 2] = torch.frombuffer(bytearray(struct.pack("<e", scale)), dtype=torch.uint8)
    slots = poisoned_slots(FLOAT32, 1)
    with pytest.raises(DataLossError, match=f"1 of 4 {tier.name} scales") as refusal:
        CODECS["absmax"].decode(body, tiers, slots[0], slots[1], FLOAT32)
    assert refusal.value.reason == "scale"
    assert slots.isnan().all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_what_is_not_finite_is_refused_at_each_tier(name: str, side: str, poison: float, dtype: torch.dtype) -> None:
    geometry = KvGeometry(layers=1, kv_heads=2, head_dim=8, native_dtype=dtype)
    codec = CODECS[name]
    tiers = tier_map(*sorted(codec.tiers))
    for token, tier in enumerate(sorted(codec.tiers)):
        states = dict(zip(("keys", "values"), draw_states(geometry, tiers.numel(), seed=4), strict=True))
        states[side][1, token, 5] = poison
        if tier == Tier.DROP:
            codec.encode(states["keys"], states["values"], tiers, geometry)
            continue
        with pytest.raises(NotFiniteError, match=rf"\b{side}\b.*tier {tier.name}\b.*infinite"):
            codec.encode(states["keys"], states["values"], tiers, geometry)


def test_what_float16_cannot_hold_is_refused_with_its_numbers() -> None:
    keys, values = draw_states(FLOAT32, 2, seed=5)
    keys[0, 1, 3], keys[1, 1, 0] = 7e4, -1.25e5
    tiers = tier_map(Tier.INT8, Tier.FP16)
    message = (
        r"of 16 elements of keys at tier FP16, 2 do not fit torch.float16, whose range is ±65504; "
        r"the largest magnitude is 125000"
    )
    with pytest.raises(InvalidArgumentError, match=message):
        CODECS["absmax"].encode(keys, values, tiers, FLOAT32)
    # INT8 reaches 127 times as far.
    CODECS["absmax"].encode(keys, values, tier_map(Tier.INT8, Tier.INT8), FLOAT32)
    keys[0, 1, 3] = 9e6
    with pytest.raises(InvalidArgumentError, match=r"1 of 4 token-heads .* tier INT8.*beyond ±8.319"):
        CODECS["absmax"].encode(keys, values, tier_map(Tier.INT8, Tier.INT8), FLOAT32)


def test_the_greatest_float16_survives_every_tier() -> None:
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=4, native_dtype=torch.float16)
    keys = torch.full((1, 3, 4), FLOAT16_MAX, dtype=torch.float16)
    tiers = tier_map(Tier.INT4, Tier.INT8, Tier.FP16)
    body = CODECS["absmax"].encode(keys, -keys, tiers, geometry).body
    slots = poisoned_slots(geometry, 3)
    CODECS["absmax"].decode(body, tiers, slots[0], slots[1], geometry)
    assert (slots[0] == FLOAT16_MAX).all()
    assert (slots[1] == -FLOAT16_MAX).all()


@pytest.mark.parametrize(("name", "foreign"), [("absmax", Tier.NATIVE), ("native", Tier.FP16), ("native", Tier.DROP)])
def test_tiers_of_another_codec_are_refused(name: str, foreign: Tier) -> None:
    keys, values = draw_states(FLOAT32, 2, seed=6)
    tiers = tier_map(Tier.FP16 if name == "absmax" else Tier.NATIVE, foreign)
    with pytest.raises(InvalidArgumentError, match="NATIVE"):
        CODECS[name].encode(keys, values, tiers, FLOAT32)
    with pytest.raises(DataLossError, match="NATIVE") as refusal:
        CODECS[name].decode(torch.zeros(64, dtype=torch.uint8), tiers, keys, values, FLOAT32)
    assert refusal.value.reason == "tier"


@pytest.mark.parametrize("name", CODECS)
def test_states_that_do_not_fit_the_geometry_are_refused(name: str) -> None:
    codec = CODECS[name]
    tiers = tier_map(*sorted(codec.tiers))
    keys, values = draw_states(FLOAT32, tiers.numel(), seed=7)
    with pytest.raises(InternalError, match=r"values are torch.float16.*torch.float32"):
        codec.encode(keys, values.half(), tiers, FLOAT32)
    with pytest.raises(InternalError, match=r"keys are .*\[1, .*\[2, "):
        codec.decode(body_of(name, FLOAT32, tiers), tiers, keys[:1], values, FLOAT32)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_body_may_start_anywhere(name: str, geometry: KvGeometry, offset: int) -> None:
    codec = CODECS[name]
    tiers = tier_map(*sorted(codec.tiers))
    body = body_of(name, geometry, tiers)
    expected, actual = poisoned_slots(geometry, tiers.numel()), poisoned_slots(geometry, tiers.numel())
    codec.decode(body, tiers, expected[0], expected[1], geometry)
    shifted = torch.cat((torch.zeros(offset, dtype=torch.uint8), body))
    codec.decode(shifted[offset:], tiers, actual[0], actual[1], geometry)
    received = poisoned_slots(geometry, tiers.numel())
    # A received payload is read-only, and its views start at their own offset.
    view = torch.frombuffer(shifted.numpy().tobytes(), dtype=torch.uint8, offset=offset)
    codec.decode(view, tiers, received[0], received[1], geometry)
    for slots in (actual, received):
        assert torch.equal(slots.isnan(), expected.isnan())
        assert torch.equal(slots.nan_to_num(), expected.nan_to_num())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_segments_that_a_gpu_codes_together_are_those_of_a_cpu_one_by_one(name: str, geometry: KvGeometry) -> None:
    codec = CODECS[name]
    allowed = torch.tensor(sorted(codec.tiers), dtype=torch.uint8)
    tiers = allowed[torch.arange(60) % allowed.numel()]
    keys, values = draw_states(geometry, 60, seed=5)
    boundaries = [0, 1, 20, 21, 40, 60]
    alone = list(codec.encode_segments(keys, values, tiers, boundaries, geometry))
    slots = poisoned_slots(geometry, 60)
    with simulated_gpu():
        together = list(codec.encode_segments(keys.to(GPU), values.to(GPU), tiers, boundaries, geometry))
        gpu_slots = slots.to(GPU)
        for (first, end), segment in zip(pairwise(boundaries), together, strict=True):
            taken = codec.decode(segment.body, tiers[first:end], *gpu_slots[:, :, first:end], geometry)
            assert taken == segment.tier_bytes
        written = gpu_slots.cpu()
    assert len(together) == len(alone) == 5
    for (first, end), one, other in zip(pairwise(boundaries), together, alone, strict=True):
        assert torch.equal(one.body, other.body)
        assert one.tier_bytes == other.tier_bytes
        codec.decode(other.body, tiers[first:end], *slots[:, :, first:end], geometry)
    assert torch.equal(written.isnan(), slots.isnan())
    assert torch.equal(written.nan_to_num(), slots.nan_to_num())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_gpu_makes_the_bytes_of_a_cpu(name: str, geometry: KvGeometry) -> None:
    codec = CODECS[name]
    allowed = torch.tensor(sorted(codec.tiers), dtype=torch.uint8)
    tiers = allowed[torch.arange(333) % allowed.numel()]
    keys, values = draw_states(geometry, 333, seed=8)
    body = codec.encode(keys, values, tiers, geometry).body
    from_gpu = codec.encode(keys.cuda(), values.cuda(), tiers, geometry).body
    assert not from_gpu.is_cuda
    assert torch.equal(from_gpu, body)
    slots, gpu_slots = poisoned_slots(geometry, 333), poisoned_slots(geometry, 333).cuda()
    codec.decode(body, tiers, slots[0], slots[1], geometry)
    codec.decode(body, tiers, gpu_slots[0], gpu_slots[1], geometry)
    assert torch.equal(gpu_slots.cpu().isnan(), slots.isnan())
    assert torch.equal(gpu_slots.cpu().nan_to_num(), slots.nan_to_num())
