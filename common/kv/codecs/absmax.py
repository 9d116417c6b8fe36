"""Codec "absmax": symmetric integers with a float16 scale for each token in each KV head.

The quantizer of the SpectrumKV paper (arXiv 2606.08635). The layout of a body is documented at
`KvChunk` in proto/spectrumkv/v1/kv.proto.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv.codecs import body as bodies
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.body import Section
from spectrumkv.common.kv.codecs.tiered import EncodedSegment, TierCodec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier, count_tiers
from spectrumkv.kernels.absmax import dispatch as kernels
from spectrumkv.kernels.absmax.dispatch import INT4, INT8

TIERS = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})
# The first sections of a body hold elements and scales, the others codes.
FLOAT_SECTIONS = 3
# By device. Offsets of one launch on a GPU have 32 bits, and a segment fits a chunk of 1 MiB.
SEGMENTS_AT_ONCE = {"cpu": 1, "cuda": 1024}
FORMATS = {Tier.INT8: INT8, Tier.INT4: INT4}


class AbsmaxCodec(TierCodec):
    """Codes tokens at FP16, INT8 or INT4, or leaves them out; see `Codec`."""

    name = "absmax"
    version = 1
    tiers = TIERS

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedSegment:
        """Code `n` tokens; see `TierCodec.encode`."""
        (segment,) = self._encode(keys, values, tiers, (0, tiers.numel()), geometry)
        return segment

    def encode_segments(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        cuts: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Code segments one by one on a CPU, where the first is on its way before the last; together on a GPU."""
        at_once = SEGMENTS_AT_ONCE[keys.device.type]
        for first in range(0, len(cuts) - 1, at_once):
            part = cuts[first : first + at_once + 1]
            span = slice(part[0], part[-1])
            own_cuts = [cut - part[0] for cut in part]
            yield from self._encode(keys[:, span], values[:, span], tiers[span], own_cuts, geometry)

    def _encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        cuts: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Code all segments in one call of the kernel, and bring them to the host in one copy."""
        bodies.check_states(keys, values, tiers, geometry)
        spans = [slice(first, end) for first, end in pairwise(cuts)]
        layouts = [_layout_to_send(tiers[span], geometry) for span in spans]
        sizes = [bodies.body_bytes(layout) for layout in layouts]
        on_device = torch.empty(sum(sizes), dtype=torch.uint8, device=keys.device)
        kernels.encode(keys, values, tiers, cuts, on_device)
        for span, layout, body in zip(spans, layouts, torch.split(bodies.to_host(on_device), sizes), strict=True):
            # Here and not on the device, which would have to be waited for once more.
            _check_sent(body, layout, {"keys": keys[:, span], "values": values[:, span]}, tiers[span])
            yield EncodedSegment(body, bodies.bytes_by_tier(layout, TIERS))

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
                f"a segment of codec absmax has {counts[Tier.NATIVE]} tokens at tier NATIVE", reason="tier"
            )
        layout = sections(counts, geometry)
        bodies.check_length(body, layout)
        # Before the body moves: looking at a GPU's scales would wait for it.
        _check_received_scales(body, layout)
        kernels.decode(body.to(keys.device), tiers, (0, tiers.numel()), keys, values)
        return bodies.bytes_by_tier(layout, TIERS)


codecs.register(AbsmaxCodec.name)(AbsmaxCodec())


def sections(counts: dict[Tier, int], geometry: KvGeometry) -> list[Section]:
    """The layout of a body: what kept its 16 bits, then scales, then codes.

    Args:
        counts: the segment's tokens at each tier.
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


def _layout_to_send(tiers: torch.Tensor, geometry: KvGeometry) -> list[Section]:
    """The layout of a segment with these tiers.

    Raises:
        InvalidArgumentError: the codec does not have one of them.
    """
    counts = count_tiers(tiers)
    if counts[Tier.NATIVE]:
        raise InvalidArgumentError(
            f"{counts[Tier.NATIVE]} tokens are at tier NATIVE, which codec absmax does not have; "
            f"valid: {', '.join(tier.name for tier in sorted(TIERS))}"
        )
    return sections(counts, geometry)


def _check_sent(
    body: torch.Tensor, layout: Sequence[Section], states: Mapping[str, torch.Tensor], tiers: torch.Tensor
) -> None:
    """Refuse elements that their tier cannot hold: they left something infinite or NaN in the body.

    Args:
        body: as it is sent.
        layout: its sections.
        states: "keys" and "values" as they came.
        tiers: the tokens' own.
    """
    for section, floats in zip(layout[:FLOAT_SECTIONS], _floats(body, layout), strict=True):
        if kernels.is_finite(floats, section.dtype):
            continue
        sides = floats.clone().view(section.dtype).view(section.shape)
        side = 0 if not bodies.is_finite(sides[0]) else 1
        name, sent = list(states.items())[side]
        if section.tier == Tier.FP16:
            kept = (tiers == Tier.FP16).to(sent.device)
            bodies.refuse_infinite(name, Tier.FP16, sent[:, kept], section.dtype)
        broken = int((~sides[side].isfinite()).sum())
        largest = torch.finfo(torch.float16).max * FORMATS[section.tier].largest
        raise InvalidArgumentError(
            f"{name} of {broken} of {sides[side].numel()} token-heads cannot be coded at tier {section.tier.name}: "
            f"they hold an element that is infinite, NaN, or beyond ±{largest:.6g}"
        )


def _check_received_scales(body: torch.Tensor, layout: Sequence[Section]) -> None:
    for section, floats in zip(layout[:FLOAT_SECTIONS], _floats(body, layout), strict=True):
        if section.tier != Tier.FP16 and not kernels.is_finite(floats, section.dtype):
            scales = floats.clone().view(section.dtype)
            broken = int((~scales.isfinite()).sum())
            raise DataLossError(
                f"{broken} of {scales.numel()} {section.tier.name} scales of a segment are infinite or NaN",
                reason="scale",
            )


def _floats(body: torch.Tensor, layout: Sequence[Section]) -> tuple[torch.Tensor, ...]:
    """The bytes of the sections that hold 16-bit floats: elements and scales, which come before all codes."""
    sizes = [section.bytes for section in layout]
    return torch.split(body, [*sizes[:FLOAT_SECTIONS], sum(sizes[FLOAT_SECTIONS:])])[:FLOAT_SECTIONS]
