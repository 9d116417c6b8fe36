"""Codec "native": keys and values in the model's own dtype, bit for bit.

The layout of a body is documented at `KvChunk` in proto/spectrumkv/v1/kv.proto.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv.codecs import body as bodies
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.tiered import EncodedSegment, TierCodec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.body import BodyLayout, Section

TIERS = frozenset({Tier.NATIVE})


class NativeCodec(TierCodec):
    """The codec that copies tokens; see `TierCodec`. Greedy output from such KV is that of one process."""

    name = "native"
    version = 1
    tiers = TIERS

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedSegment:
        """Code `n` tokens; see `TierCodec.encode`.

        Args:
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides, on any device.
            values: like `keys`.
            tiers: uint8 `[n]` on the CPU, all NATIVE.
            geometry: shape and dtype of the model's cache.

        Returns:
            The tokens, as they are.

        Raises:
            InvalidArgumentError: a tier is not NATIVE.
            NotFiniteError: an element is infinite or NaN.
        """
        if keys.is_cuda:
            (segment,) = self.encode_segments(keys, values, tiers, (0, tiers.numel()), geometry)
            return segment
        _check_sent(keys, values, tiers, geometry)
        layout = body_layout(tiers.numel(), geometry)
        body = torch.empty(layout.bytes, dtype=torch.uint8)
        (both,) = layout.arrays(body)
        both[0].copy_(keys)
        both[1].copy_(values)
        _check_finite(both, geometry)
        return EncodedSegment(body, bodies.bytes_by_tier(layout, TIERS))

    def encode_segments(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        boundaries: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Code segments one by one on a CPU; on a GPU together, where the host waits once and looks at no element.

        Args:
            keys: see `encode`.
            values: see `encode`.
            tiers: see `encode`.
            boundaries: the first token of each segment, rising from 0, and n.
            geometry: see `encode`.

        Yields:
            The segments in order; see `encode`.
        """
        if not keys.is_cuda:
            yield from super().encode_segments(keys, values, tiers, boundaries, geometry)
            return
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.kernels.native import triton

        _check_sent(keys, values, tiers, geometry)
        layouts = [body_layout(end - first, geometry) for first, end in pairwise(boundaries)]
        sizes = [layout.bytes for layout in layouts]
        layer = triton.encode(keys, values, boundaries)
        layer = layer.copied(bodies.to_host(layer.memory))
        is_broken = bool(layer.broken.numpy().any())
        for layout, body in zip(layouts, torch.split(layer.bodies, sizes), strict=True):
            if is_broken:
                _check_finite(layout.arrays(body)[0], geometry)
            yield EncodedSegment(body, bodies.bytes_by_tier(layout, TIERS))

    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        """Write the tokens of `body` into `keys` and `values`; see `TierCodec.decode`.

        Args:
            body: uint8 `[b]` on the CPU.
            tiers: uint8 `[n]` on the CPU, all NATIVE.
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides, on any device; written.
            values: like `keys`.
            geometry: shape and dtype of the model's cache.

        Returns:
            The bytes of the tier NATIVE.

        Raises:
            DataLossError: a tier is not NATIVE, or the body has another length.
        """
        if keys.is_cuda:
            (taken,) = self.decode_segments([body], [tiers], [(keys, values)], geometry)
            return taken
        layout = _checked_layout(body, tiers, keys, values, geometry)
        (both,) = layout.arrays(body)
        keys.copy_(both[0])
        values.copy_(both[1])
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
            For each segment the bytes of the tier NATIVE.

        Raises:
            DataLossError: see `decode`; nothing is written then.
        """
        if not slots[0][0].is_cuda:
            return super().decode_segments(coded, tiers, slots, geometry)
        from spectrumkv.kernels.native import triton

        layouts = [
            _checked_layout(body, of_tokens, *states, geometry)
            for body, of_tokens, states in zip(coded, tiers, slots, strict=True)
        ]
        triton.decode(coded, slots)
        return [bodies.bytes_by_tier(layout, TIERS) for layout in layouts]


codecs.register(NativeCodec.name)(NativeCodec())


def body_layout(tokens: int, geometry: KvGeometry) -> BodyLayout:
    """Return the layout of a body of `tokens` tokens: keys, then values."""
    shape = (2, geometry.kv_heads, tokens, geometry.head_dim)
    return BodyLayout((Section(Tier.NATIVE, shape, geometry.native_dtype),))


def _checked_layout(
    body: torch.Tensor, tiers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: KvGeometry
) -> BodyLayout:
    """Lay out a body that arrived.

    Returns:
        The layout.

    Raises:
        DataLossError: a tier is not NATIVE, or the body has another length.
    """
    bodies.check_states(keys, values, tiers, geometry)
    if not _all_native(tiers):
        raise DataLossError(
            f"a segment of codec native has tiers {sorted(set(tiers.tolist()))}; all must be NATIVE",
            reason="tier",
        )
    layout = body_layout(tiers.numel(), geometry)
    bodies.check_length(body, layout)
    return layout


def _check_sent(keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry) -> None:
    """Refuse what is not NATIVE, or not of the model's geometry; see `TierCodec.encode`.

    Raises:
        InvalidArgumentError: a tier is not NATIVE.
    """
    bodies.check_states(keys, values, tiers, geometry)
    if not _all_native(tiers):
        raise InvalidArgumentError(
            f"codec native has the tier NATIVE only; the segment has tiers {sorted(set(tiers.tolist()))}"
        )


def _check_finite(both: torch.Tensor, geometry: KvGeometry) -> None:
    """Refuse keys and values, `[2, kv_heads, n, head_dim]` on the CPU, that are not all finite.

    Raises:
        NotFiniteError: an element is infinite or NaN.
    """
    for side, states in zip(("keys", "values"), both, strict=True):
        if not bodies.is_finite(states):
            bodies.refuse_infinite(side, Tier.NATIVE, states, geometry.native_dtype)


def _all_native(tiers: torch.Tensor) -> bool:
    return bool((tiers == Tier.NATIVE).all())
