"""Codec "absmax": symmetric integers with a float16 scale for each token in each KV head.

The quantizer of the SpectrumKV paper (arXiv 2606.08635). The layout of a body is documented at `KvChunk` in
proto/spectrumkv/v1/kv.proto and computed in `spectrumkv.kernels.absmax.layout`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.codecs import body as bodies
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.tiered import EncodedSegment, TierCodec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels import absmax as kernels
from spectrumkv.kernels.absmax import FORMATS
from spectrumkv.kernels.body import BodyLayout
from spectrumkv.kernels.tiers import tier_counts

TIERS = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})
# By device. Offsets of one launch on a GPU have 32 bits, and a segment fits a chunk of 1 MiB.
SEGMENTS_AT_ONCE = {"cpu": 1, "cuda": 1024}


class AbsmaxCodec(TierCodec):
    """The codec that writes tokens at FP16, INT8 or INT4, or leaves them out; see `TierCodec`."""

    name = "absmax"
    version = 1
    tiers = TIERS

    def prepare(self, geometry: KvGeometry) -> None:
        """Compile the loops for CPUs; see `Codec.prepare`."""
        kernels.prepare(geometry.native_dtype)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedSegment:
        """Code the tokens of one segment.

        Args:
            keys: the model's dtype `[kv_heads, n, head_dim]`, any strides.
            values: like `keys`, on the same device.
            tiers: uint8 `[n]` on the CPU, values of `Tier`.
            geometry: shape and dtype of the model's cache.

        Returns:
            The body, on the CPU, and the bytes of each tier in it.
        """
        (segment,) = self._encode(keys, values, tiers, (0, tiers.numel()), geometry)
        return segment

    def encode_segments(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        boundaries: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Code segments one by one on a CPU, where the first is sent before the last is coded; together on a GPU.

        Args:
            keys: the model's dtype `[kv_heads, n, head_dim]`, any strides.
            values: like `keys`, on the same device.
            tiers: uint8 `[n]` on the CPU, values of `Tier`.
            boundaries: the first token of each segment, rising from 0, and n.
            geometry: shape and dtype of the model's cache.

        Yields:
            The segments in order; see `encode`.
        """
        at_once = SEGMENTS_AT_ONCE[keys.device.type]
        for first in range(0, len(boundaries) - 1, at_once):
            part = boundaries[first : first + at_once + 1]
            span = slice(part[0], part[-1])
            own_boundaries = [boundary - part[0] for boundary in part]
            yield from self._encode(keys[:, span], values[:, span], tiers[span], own_boundaries, geometry)

    def _encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        boundaries: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Yield all segments, coded in one call of the kernel and brought to the host in one copy."""
        bodies.check_states(keys, values, tiers, geometry)
        spans = [slice(first, end) for first, end in pairwise(boundaries)]
        layouts = [_layout_to_send(tiers[span], geometry) for span in spans]
        sizes = [layout.bytes for layout in layouts]
        on_device = torch.empty(sum(sizes), dtype=torch.uint8, device=keys.device)
        kernels.encode(keys, values, tiers, boundaries, on_device)
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
        """Write the tokens of `body` into `keys` and `values`.

        Args:
            body: uint8 `[b]` on the CPU, at any address.
            tiers: uint8 `[n]` on the CPU, values of `Tier`.
            keys: the model's dtype `[kv_heads, n, head_dim]`, any strides; written, except where tokens were dropped.
            values: like `keys`, on the same device.
            geometry: shape and dtype of the model's cache.

        Returns:
            The bytes of each tier in the body.

        Raises:
            DataLossError: a tier is not one of the codec's, the length is not what the tiers make it, or a scale is
                infinite or NaN.
        """
        bodies.check_states(keys, values, tiers, geometry)
        counts = tier_counts(tiers.numpy())
        if counts[Tier.NATIVE]:
            raise DataLossError(
                f"a segment of codec absmax has {counts[Tier.NATIVE]} tokens at tier NATIVE", reason="tier"
            )
        layout = _layout(counts, geometry)
        bodies.check_length(body, layout)
        # Before the body moves: looking at a GPU's scales would wait for it.
        _check_received_scales(body, layout)
        kernels.decode(body.to(keys.device), tiers, (0, tiers.numel()), keys, values)
        return bodies.bytes_by_tier(layout, TIERS)


codecs.register(AbsmaxCodec.name)(AbsmaxCodec())


def _layout(counts: tuple[int, ...], geometry: KvGeometry) -> BodyLayout:
    """Lay out a body; see `spectrumkv.kernels.absmax.layout.body_layout`.

    Args:
        counts: the segment's tokens at each tier, by its code.
        geometry: shape and dtype of the model's cache.

    Returns:
        The layout.
    """
    return kernels.body_layout(counts, geometry.kv_heads, geometry.head_dim, geometry.half_dtype)


def _layout_to_send(tiers: torch.Tensor, geometry: KvGeometry) -> BodyLayout:
    """Lay out the body of a segment with these tiers.

    Args:
        tiers: uint8 `[n]` on the CPU.
        geometry: shape and dtype of the model's cache.

    Returns:
        The layout.

    Raises:
        InvalidArgumentError: the codec does not have one of them.
    """
    counts = tier_counts(tiers.numpy())
    if counts[Tier.NATIVE]:
        raise InvalidArgumentError(
            f"{counts[Tier.NATIVE]} tokens are at tier NATIVE, which codec absmax does not have; "
            f"valid: {', '.join(tier.name for tier in sorted(TIERS))}"
        )
    return _layout(counts, geometry)


def _check_sent(
    body: torch.Tensor, layout: BodyLayout, states: Mapping[str, torch.Tensor], tiers: torch.Tensor
) -> None:
    """Refuse elements that their tier cannot hold: they left something infinite or NaN in the body.

    Args:
        body: uint8, as it is sent.
        layout: of the body.
        states: "keys" and "values" as they came, each `[kv_heads, n, head_dim]`.
        tiers: uint8 `[n]` on the CPU.

    Raises:
        NotFiniteError: an element is infinite or NaN.
        InvalidArgumentError: an element is too large for the tier of its token.
    """
    for section, data in zip(layout.sections, layout.split(body), strict=True):
        if not section.dtype.is_floating_point or kernels.halves_are_finite(data, section.dtype):
            continue
        sides = data.clone().view(section.dtype).view(section.shape)
        side = 0 if not bodies.is_finite(sides[0]) else 1
        name, sent = list(states.items())[side]
        if section.tier == Tier.FP16:
            kept = (tiers == Tier.FP16).to(sent.device)
            bodies.refuse_infinite(name, Tier.FP16, sent[:, kept], section.dtype)
        broken = int((~sides[side].isfinite()).sum())
        largest = torch.finfo(torch.float16).max * FORMATS[section.tier].largest
        coded = sent[:, (tiers == section.tier).to(sent.device)]
        kind = InvalidArgumentError if bool(coded.isfinite().all()) else NotFiniteError
        raise kind(
            f"{name} of {broken} of {sides[side].numel()} token-heads cannot be coded at tier "
            f"{Tier(section.tier).name}: they hold an element that is infinite, NaN, or beyond ±{largest:.6g}"
        )


def _check_received_scales(body: torch.Tensor, layout: BodyLayout) -> None:
    """Refuse a body with scales that are infinite or NaN.

    Args:
        body: uint8, as it arrived.
        layout: of the body.

    Raises:
        DataLossError: with the reason `scale`.
    """
    for section, data in zip(layout.sections, layout.split(body), strict=True):
        is_scale = section.dtype.is_floating_point and section.tier != Tier.FP16
        if is_scale and not kernels.halves_are_finite(data, section.dtype):
            scales = data.clone().view(section.dtype)
            broken = int((~scales.isfinite()).sum())
            raise DataLossError(
                f"{broken} of {scales.numel()} {Tier(section.tier).name} scales of a segment are infinite or NaN",
                reason="scale",
            )
