"""Codec "absmax": symmetric integers with a float16 scale for each token in each KV head.

The quantizer of the SpectrumKV paper (arXiv 2606.08635). The layout of a body is documented at `KvChunk` in
proto/spectrumkv/v1/kv.proto and computed in `spectrumkv.kernels.absmax.layout`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv.allocation import RankedTiers
from spectrumkv.common.kv.codecs import body as bodies
from spectrumkv.common.kv.codecs.absmax_checks import check_received_scales, check_sent
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.segmentation import MAX_BODY_BYTES, MAX_SEGMENT_TOKENS
from spectrumkv.common.kv.codecs.tiered import EncodedSegment, TierCodec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.ranks import check_scores
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels import absmax as kernels
from spectrumkv.kernels.body import BodyLayout
from spectrumkv.kernels.tier_placement import SegmentRoom
from spectrumkv.kernels.tier_placement.layout import END
from spectrumkv.kernels.tiers import tier_counts

TIERS = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})


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
        if keys.is_cuda:
            (segment,) = self.encode_segments(keys, values, tiers, (0, tiers.numel()), geometry)
            return segment
        bodies.check_states(keys, values, tiers, geometry)
        layout = _layout_to_send(tiers, geometry)
        body = torch.empty(layout.bytes, dtype=torch.uint8)
        kernels.encode(keys, values, tiers, (0, tiers.numel()), body)
        check_sent(body, layout, {"keys": keys, "values": values}, tiers)
        return EncodedSegment(body, bodies.bytes_by_tier(layout, TIERS))

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
        if not keys.is_cuda:
            yield from super().encode_segments(keys, values, tiers, boundaries, geometry)
            return
        bodies.check_states(keys, values, tiers, geometry)
        layouts = [_layout_to_send(tiers[first:end], geometry) for first, end in pairwise(boundaries)]
        layer = kernels.encode_tiers(keys, values, tiers, boundaries, sum(layout.bytes for layout in layouts))
        _, _, coded, broken, _ = layer.copied(bodies.to_host(layer.memory)).parts
        states = {"keys": keys, "values": values}
        yield from _segments(coded, broken, layouts, states, tiers, boundaries)

    def encode_ranked(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: RankedTiers, geometry: KvGeometry
    ) -> Iterator[tuple[torch.Tensor, EncodedSegment]]:
        """Code a layer on a GPU at tiers that are known there only; the host waits once, for all that it sends.

        Args:
            keys: the model's dtype `[kv_heads, n, head_dim]`, any strides.
            values: like `keys`, on the same device.
            tiers: what they follow from.
            geometry: shape and dtype of the model's cache.

        Yields:
            See `TierCodec.encode_ranked`.

        Raises:
            NotFiniteError: a score or an element is infinite or NaN.
            InvalidArgumentError: an element is too large for its tier.
        """
        taken = kernels.token_bytes(geometry.kv_heads, geometry.head_dim)
        room = SegmentRoom(taken, MAX_BODY_BYTES, MAX_SEGMENT_TOKENS)
        layer = kernels.encode_ranked(keys, values, tiers.scores, tiers.ranks, room)
        found, table, coded, broken, known = layer.copied(bodies.to_host(layer.memory)).parts
        not_finite, segments = found.tolist()
        if not_finite:
            check_scores(tiers.scores.cpu())
        bodies.check_states(keys, values, known, geometry)
        boundaries = [0, *table[:segments, END].tolist()]
        layouts = [_layout_to_send(known[first:end], geometry) for first, end in pairwise(boundaries)]
        states = {"keys": keys, "values": values}
        coded_segments = _segments(coded, broken, layouts, states, known, boundaries)
        for (first, end), segment in zip(pairwise(boundaries), coded_segments, strict=True):
            yield known[first:end], segment

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
        if keys.is_cuda:
            (taken,) = self.decode_segments([body], [tiers], [(keys, values)], geometry)
            return taken
        layout = _checked_layout(body, tiers, keys, values, geometry)
        kernels.decode(body, tiers, (0, tiers.numel()), keys, values)
        return bodies.bytes_by_tier(layout, TIERS)

    def decode_segments(
        self,
        coded: Sequence[torch.Tensor],
        tiers: Sequence[torch.Tensor],
        slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
        geometry: KvGeometry,
    ) -> list[dict[Tier, int]]:
        """Write segments one by one on a CPU; all by one copy and one launch on a GPU. See `TierCodec`.

        Args:
            coded: one body for each segment.
            tiers: for each segment.
            slots: keys and values of each segment, views of one cache.
            geometry: shape and dtype of the model's cache.

        Returns:
            For each segment the bytes of each tier in its body.

        Raises:
            DataLossError: see `decode`; nothing is written then.
        """
        if not slots[0][0].is_cuda:
            return super().decode_segments(coded, tiers, slots, geometry)
        layouts = [
            _checked_layout(body, of_tokens, *states, geometry)
            for body, of_tokens, states in zip(coded, tiers, slots, strict=True)
        ]
        kernels.decode_segments(coded, tiers, slots)
        return [bodies.bytes_by_tier(layout, TIERS) for layout in layouts]


codecs.register(AbsmaxCodec.name)(AbsmaxCodec())


def _segments(
    coded: torch.Tensor,
    broken: torch.Tensor,
    layouts: Sequence[BodyLayout],
    states: Mapping[str, torch.Tensor],
    tiers: torch.Tensor,
    boundaries: Sequence[int],
) -> Iterator[EncodedSegment]:
    """Take apart a layer that came from a GPU.

    Args:
        coded: uint8 `[b]` on the CPU, the segments' bodies.
        broken: uint8 on the CPU, not 0 where a part of the layer does not fit its tiers.
        layouts: of the bodies.
        states: "keys" and "values" of the layer, on the GPU.
        tiers: uint8 `[n]` on the CPU.
        boundaries: the first token of each segment, rising from 0, and n.

    Yields:
        The segments.

    Raises:
        NotFiniteError: an element is infinite or NaN.
        InvalidArgumentError: an element is too large for the tier of its token.
    """
    is_broken = bool(broken.numpy().any())
    sizes = [layout.bytes for layout in layouts]
    for (first, end), layout, body in zip(pairwise(boundaries), layouts, torch.split(coded, sizes), strict=True):
        if is_broken:
            of_segment = {name: side[:, first:end] for name, side in states.items()}
            check_sent(body, layout, of_segment, tiers[first:end])
        yield EncodedSegment(body, bodies.bytes_by_tier(layout, TIERS))


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
            f"allowed: {', '.join(tier.name for tier in sorted(TIERS))}"
        )
    return _layout(counts, geometry)


def _checked_layout(
    body: torch.Tensor, tiers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: KvGeometry
) -> BodyLayout:
    """Lay out a body that arrived, on the CPU, where looking at it waits for no GPU.

    Returns:
        The layout.

    Raises:
        DataLossError: a tier, the length or a scale is wrong; see `AbsmaxCodec.decode`.
    """
    bodies.check_states(keys, values, tiers, geometry)
    counts = tier_counts(tiers.numpy())
    if counts[Tier.NATIVE]:
        raise DataLossError(
            f"a segment of codec absmax has {counts[Tier.NATIVE]} tokens at tier NATIVE", reason="tier"
        )
    layout = _layout(counts, geometry)
    bodies.check_length(body, layout)
    check_received_scales(body, layout)
    return layout
