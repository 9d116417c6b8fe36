"""Writes the segments of a message into slots on a GPU: one copy there and two launches, and no wait."""

from collections.abc import Sequence

import numpy as np
import torch

from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis
from spectrumkv.common.kv.codecs.fixed_rate.received import ReceivedBody
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.kernels.fixed_rate.triton.decoding.decode import ReceivedSegment, decode


def write_segments(
    on_device: DeviceBasis,
    segments: Sequence[KvSegment],
    bodies: Sequence[ReceivedBody],
    slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write the tokens of segments.

    Args:
        on_device: basis that they were made with, on the GPU of the slots; it stays until they are written.
        segments: at least one.
        bodies: their bodies, checked.
        slots: keys and values of each, `[kv_heads, n, head_dim]`, views of one cache on a GPU; written.
    """
    received = [_received(one, body, on_device.kinds) for one, body in zip(segments, bodies, strict=True)]
    positions = max(one.first_token + one.tiers.numel() for one in segments)
    decode(received, slots, on_device.angles(positions), on_device.synthesis)


def _received(segment: KvSegment, received: ReceivedBody, kinds: Sequence[int]) -> ReceivedSegment:
    layer, first, coded = segment.layer, segment.first_token, received.coded
    if coded is None:
        return ReceivedSegment(received.body, layer, kinds[layer], first, received.sinks, HEADER.size)
    return ReceivedSegment(
        received.body,
        layer,
        kinds[layer],
        first,
        received.sinks,
        HEADER.size,
        coded.scales,
        coded.tokens.numpy(),
        coded.layout,
        coded.base,
        coded.turn,
        coded.words_at,
        np.frombuffer(coded.records.escape_index.numpy().tobytes(), "<u4"),
    )
