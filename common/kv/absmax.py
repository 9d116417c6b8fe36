"""Codec "absmax": symmetric integers with a float16 scale for each token in each KV head.

The quantizer of the SpectrumKV paper (arXiv 2606.08635). The layout of a body is documented at
`KvChunk` in proto/spectrumkv/v1/kv.proto.
"""

from dataclasses import dataclass

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv import body as bodies
from spectrumkv.common.kv.body import Section
from spectrumkv.common.kv.codec import EncodedBlock, TierCodec, codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.kernels.absmax import INT4, INT8, dequantize, quantize

TIERS = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})
FORMATS = {Tier.INT8: INT8, Tier.INT4: INT4}


class AbsmaxCodec(TierCodec):
    """Codes tokens at FP16, INT8 or INT4, or leaves them out; see `Codec`."""

    name = "absmax"
    version = 1
    tiers = TIERS

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedBlock:
        """Code `n` tokens; see `Codec.encode`."""
        bodies.check_states(keys, values, tiers, geometry)
        counts = count_tiers(tiers)
        if counts[Tier.NATIVE]:
            raise InvalidArgumentError(
                f"{counts[Tier.NATIVE]} tokens are at tier NATIVE, which codec absmax does not have; "
                f"valid: {', '.join(tier.name for tier in sorted(TIERS))}"
            )
        layout = sections(counts, geometry)
        device_body = torch.empty(bodies.body_bytes(layout), dtype=torch.uint8, device=keys.device)
        parts = Parts(*bodies.cut(device_body, layout))
        index = token_index(tiers, counts, keys.device)
        for side, states in enumerate((keys, values)):
            parts.fp16[side].copy_(states.index_select(1, index[Tier.FP16]))
            for tier, form in FORMATS.items():
                codes, scales = parts.coded(tier)
                quantize(states, index[tier], codes[side], scales[side], form)

        body = bodies.to_host(device_body)
        # Here and not on the device, which would have to be waited for once more.
        _check_sent(Parts(*bodies.cut(body, layout)), {"keys": keys, "values": values}, index, geometry)
        return EncodedBlock(body, bodies.bytes_by_tier(layout, TIERS))

    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        """Write the tokens of `body` into `keys` and `values`; see `Codec.decode`."""
        bodies.check_states(keys, values, tiers, geometry)
        counts = count_tiers(tiers)
        if counts[Tier.NATIVE]:
            raise DataLossError(
                f"a block of codec absmax has {counts[Tier.NATIVE]} tokens at tier NATIVE", reason="tier"
            )
        layout = sections(counts, geometry)
        bodies.check_length(body, layout)
        # Before the body moves: looking at a GPU's scales would wait for it.
        _check_received_scales(Parts(*bodies.cut(body, layout)))
        parts = Parts(*bodies.cut(body.to(keys.device), layout))
        index = token_index(tiers, counts, keys.device)
        for side, states in enumerate((keys, values)):
            states.index_copy_(1, index[Tier.FP16], parts.fp16[side].to(states.dtype))
            for tier, form in FORMATS.items():
                codes, scales = parts.coded(tier)
                dequantize(codes[side], scales[side], index[tier], states, form)
        return bodies.bytes_by_tier(layout, TIERS)


codecs.register(AbsmaxCodec.name)(AbsmaxCodec())


@dataclass(frozen=True)
class Parts:
    """The sections of a body as tensors, in the order of the layout; index 0 of each is keys, 1 values.

    Attributes:
        fp16: the model's 16-bit dtype `[2, kv_heads, n16, head_dim]`.
        int8_scales: float16 `[2, kv_heads, n8]`.
        int4_scales: float16 `[2, kv_heads, n4]`.
        int8_codes: int8 `[2, kv_heads, n8, head_dim]`.
        int4_codes: uint8 `[2, kv_heads, n4, head_dim / 2]`.
    """

    fp16: torch.Tensor
    int8_scales: torch.Tensor
    int4_scales: torch.Tensor
    int8_codes: torch.Tensor
    int4_codes: torch.Tensor

    def coded(self, tier: Tier) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of INT8 or INT4."""
        if tier == Tier.INT8:
            return self.int8_codes, self.int8_scales
        return self.int4_codes, self.int4_scales


def sections(counts: dict[Tier, int], geometry: KvGeometry) -> list[Section]:
    """The layout of a body, in the order of `Parts`.

    Args:
        counts: the block's tokens at each tier.
        geometry: shape and dtype of the model's cache.
    """
    heads, head_dim = geometry.kv_heads, geometry.head_dim
    n16, n8, n4 = counts[Tier.FP16], counts[Tier.INT8], counts[Tier.INT4]
    return [
        Section(Tier.FP16, (2, heads, n16, head_dim), geometry.half_dtype),
        Section(Tier.INT8, (2, heads, n8), torch.float16),
        Section(Tier.INT4, (2, heads, n4), torch.float16),
        Section(Tier.INT8, (2, heads, n8, INT8.code_bytes(head_dim)), INT8.dtype),
        Section(Tier.INT4, (2, heads, n4, INT4.code_bytes(head_dim)), INT4.dtype),
    ]


def token_index(tiers: torch.Tensor, counts: dict[Tier, int], device: torch.device) -> dict[Tier, torch.Tensor]:
    """Positions of each tier's tokens in the block, ascending.

    Args:
        tiers: uint8 `[n]` on the CPU.
        counts: tokens at each tier, for every `Tier`.
        device: where the positions are wanted.

    Returns:
        int64 `[counts[tier]]` for each tier; one transfer for all of them.
    """
    by_tier = torch.argsort(tiers, stable=True).to(device)
    return dict(zip(Tier, torch.split(by_tier, [counts[tier] for tier in Tier]), strict=True))


def _check_sent(
    parts: Parts, states: dict[str, torch.Tensor], index: dict[Tier, torch.Tensor], geometry: KvGeometry
) -> None:
    """Refuse elements that their tier cannot hold: they left something infinite or NaN in the body.

    Args:
        parts: of the finished body, on the CPU.
        states: "keys" and "values" as they came.
        index: see `token_index`.
        geometry: shape and dtype of the model's cache.
    """
    for side, (name, elements) in enumerate(states.items()):
        if not bodies.is_finite(parts.fp16[side]):
            sent = elements.index_select(1, index[Tier.FP16])
            bodies.refuse_infinite(name, Tier.FP16, sent, geometry.half_dtype)
        for tier, form in FORMATS.items():
            scales = parts.coded(tier)[1][side]
            if not bodies.is_finite(scales):
                broken = int((~scales.isfinite()).sum())
                largest = torch.finfo(torch.float16).max * form.largest
                raise InvalidArgumentError(
                    f"{name} of {broken} of {scales.numel()} token-heads cannot be coded at tier {tier.name}: "
                    f"they hold an element that is infinite, NaN, or beyond ±{largest:.6g}"
                )


def _check_received_scales(parts: Parts) -> None:
    for tier in FORMATS:
        scales = parts.coded(tier)[1]
        if not bodies.is_finite(scales):
            broken = int((~scales.isfinite()).sum())
            raise DataLossError(
                f"{broken} of {scales.numel()} {tier.name} scales of a block are infinite or NaN", reason="scale"
            )
