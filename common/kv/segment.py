"""A segment: a run of consecutive tokens of one layer, coded, and how it is laid out.

The layout is documented at `KvChunk` in proto/spectrumkv/v1/kv.proto.
"""

import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.tiers import Tier, pack_tier_map, tier_map_bytes, unpack_tier_map

# Torch has no read-only tensors and warns of a read-only buffer; a received payload is never written to.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

# Layer, tier map kind, uniform tier, first token, tokens, body bytes.
SEGMENT_HEADER = struct.Struct("<HBBIII")
PER_TOKEN, UNIFORM = 0, 1
MAX_CHUNK_PAYLOAD_BYTES = 1 << 20

Buffer = bytes | memoryview


@dataclass(frozen=True)
class KvSegment:
    """A run of consecutive tokens of one layer, coded.

    Attributes:
        layer: from 0.
        first_token: position of the first token in the prompt.
        tiers: uint8 `[n]` on the CPU.
        body: uint8 `[b]` on the CPU, as the codec made it.
        tier_bytes: how many bytes of `body` each tier took; empty in a segment that arrived, where the codec tells.
    """

    layer: int
    first_token: int
    tiers: torch.Tensor
    body: torch.Tensor
    tier_bytes: Mapping[Tier, int] = field(default_factory=dict)

    @cached_property
    def header(self) -> bytes:
        """Lay out header and tier map."""
        tiers = self.tiers.numpy()
        first = int(tiers[0])
        uniform = bool((tiers == first).all())
        kind, tier = (UNIFORM, first) if uniform else (PER_TOKEN, 0)
        fixed = SEGMENT_HEADER.pack(self.layer, kind, tier, self.first_token, self.tiers.numel(), self.body.numel())
        return fixed if uniform else fixed + pack_tier_map(self.tiers)

    @property
    def wire_bytes(self) -> int:
        """Count the bytes it takes of a budget: header, tier map and body."""
        return len(self.header) + self.body.numel()


def parse_segment(payload: Buffer, offset: int) -> tuple[KvSegment, int]:
    """Read a segment from a chunk's payload.

    Args:
        payload: of the chunk.
        offset: byte at which the segment starts.

    Returns:
        The segment, whose tensors are views of the payload, and the offset of the next one.

    Raises:
        DataLossError: the payload does not hold what the segment's header says.
    """
    try:
        layer, kind, tier, first_token, tokens, body_bytes = SEGMENT_HEADER.unpack_from(payload, offset)
    except struct.error:
        raise DataLossError(f"a segment header is cut off at byte {offset}", "malformed") from None
    start = offset + SEGMENT_HEADER.size
    map_bytes = tier_map_bytes(tokens) if kind == PER_TOKEN else 0
    end = start + map_bytes + body_bytes
    if kind not in (PER_TOKEN, UNIFORM) or tokens == 0 or body_bytes % 2 or end > len(payload):
        raise DataLossError(
            f"segment at byte {offset} of {len(payload)}: tier map kind {kind}, {tokens} tokens and "
            f"{body_bytes} body bytes do not fit together",
            "malformed",
        )
    if kind == UNIFORM:
        tiers = _uniform_tiers(tier, tokens, len(payload))
    else:
        tiers = unpack_tier_map(_view(payload, start, map_bytes), tokens)
    return KvSegment(layer, first_token, tiers, _view(payload, start + map_bytes, body_bytes)), end


def _uniform_tiers(tier: int, tokens: int, payload_bytes: int) -> torch.Tensor:
    """Return the tiers of a segment that names one for all its tokens, uint8 `[tokens]`.

    Raises:
        DataLossError: there is no such tier, or the payload cannot hold so many tokens.
    """
    if tier not in Tier.__members__.values():
        raise DataLossError(f"a segment names tier {tier}; known are {[int(t) for t in Tier]}", "malformed")
    # Every token but a dropped one takes body bytes, so the payload bounds the count; dropped ones are
    # bounded here, or a 16-byte segment could ask for gigabytes.
    if tier == Tier.DROP and tokens > MAX_CHUNK_PAYLOAD_BYTES:
        raise DataLossError(f"a segment of {tokens} dropped tokens is larger than any prompt", "range")
    if tier != Tier.DROP and tokens > payload_bytes:
        raise DataLossError(f"a segment of {tokens} tokens does not fit {payload_bytes} bytes", "malformed")
    return torch.full((tokens,), tier, dtype=torch.uint8)


def _view(payload: Buffer, start: int, length: int) -> torch.Tensor:
    """Return bytes of the payload as a tensor, uint8 `[length]`, without a copy."""
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(payload, dtype=torch.uint8, count=length, offset=start)
