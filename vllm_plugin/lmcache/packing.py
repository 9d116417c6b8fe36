"""Packs the KV of one LMCache chunk into bytes, and unpacks it; without LMCache.

LMCache stores chunks of tokens that may come from anywhere in a prompt, long after it ran. There are no queries, so
tokens are ranked by the norm of their keys, and no positions, so the codecs of the calibrated basis, which undo the
rotary embedding, cannot be used: what is left is codec `absmax` under a policy of tiers that drops nothing.

Packed: "SKV1", uint32 number of chunks, uint64 their payload bytes, 32 bytes of digest (the fields of End); then for
each chunk uint32 payload bytes, uint32 CRC-32C, payload, as in kv.proto. Integers are little-endian.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.plan import CodingPlan
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.receiving import SegmentWriter
from spectrumkv.common.kv.segment import SEGMENT_HEADER
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, ChunkWriter, KvChunk

CODEC, SCORER = "absmax", "key_norm"
CHUNK_BYTES = 512 << 10
_HEAD, _CHUNK = struct.Struct("<4sIQ32s"), struct.Struct("<II")
_MAGIC = b"SKV1"
# Bytes of a scale, of which a token has one for each KV head and side.
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Packer:
    """Packs chunks of one model's KV.

    Attributes:
        policy: that gives tokens their tiers.
        budget: mean tier cost.
        head_dim: elements of one key.

    Raises:
        InvalidArgumentError: the policy needs queries or a codec of its own, the budget is out of its range, or
            tokens would be dropped.
    """

    policy: str
    budget: float
    head_dim: int

    def __post_init__(self) -> None:
        chosen = policies.get(self.policy)
        if chosen.budget_kind is not BudgetKind.TIER_COST or chosen.codec is not None:
            raise InvalidArgumentError(
                f"policy {self.policy!r} cannot pack chunks of a cache, which have no queries and no positions; use "
                "greedy, balanced, sink-protect, uniform-int8 or fp16"
            )
        if self.plan.drops_tokens(KvGeometry(1, 1, 2, torch.float32), 256):
            raise InvalidArgumentError(
                f"policy {self.policy!r} drops tokens at budget {self.budget:g}, and LMCache needs all of them"
            )

    @property
    def plan(self) -> CodingPlan:
        """Return how chunks are coded."""
        chosen = policies.get(self.policy)
        codec = codecs.get(CODEC)
        return CodingPlan(chosen, chosen.budget(self.budget), SCORER, codec, "layer", Int4Layers(), seed=0)

    def geometry(self, shape: torch.Size, dtype: torch.dtype) -> KvGeometry:
        """Return the shape of a chunk's cache.

        Args:
            shape: `[2, layers, tokens, kv_heads · head_dim]`, LMCache's KV_2LTD.
            dtype: of its elements.

        Raises:
            InvalidArgumentError: the shape is another one.
        """
        if len(shape) != 4 or shape[0] != 2 or shape[3] % self.head_dim:
            raise InvalidArgumentError(
                f"a chunk has shape {list(shape)}; wanted is [2, layers, tokens, KV heads · {self.head_dim}]"
            )
        return KvGeometry(shape[1], shape[3] // self.head_dim, self.head_dim, dtype)

    def most_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the most bytes that a chunk can take packed.

        Args:
            shape: see `geometry`.
            dtype: of its elements.
        """
        geometry, tokens = self.geometry(shape, dtype), shape[2]
        scales = geometry.layers * tokens * 2 * geometry.kv_heads * _SCALE_BYTES
        # Of the policies that drop nothing, SinkProtect alone exceeds its budget, by 4 tokens of 16 bits at most.
        codes = int(self.budget * geometry.fp16_bytes(tokens)) + geometry.fp16_bytes(min(tokens, 4))
        # Segments are closed near the target of a chunk, and a layer's last one may be short.
        segments = 2 * geometry.layers + (codes + scales) // CHUNK_BYTES
        maps = geometry.layers * (tokens // 4 + 2)
        return _HEAD.size + codes + scales + maps + 2 * segments * (SEGMENT_HEADER.size + _CHUNK.size)

    def pack(self, states: torch.Tensor) -> bytes:
        """Pack a chunk.

        Args:
            states: `[2, layers, tokens, kv_heads · head_dim]`.

        Returns:
            The packed chunk.

        Raises:
            InvalidArgumentError: the shape is another one, or an element is too large.
            NotFiniteError: an element is infinite or NaN.
        """
        geometry, tokens = self.geometry(states.shape, states.dtype), states.shape[2]
        heads = _by_heads(states, geometry)
        encoder, writer = self.plan.encoder(geometry, tokens, 0), ChunkWriter(CHUNK_BYTES)
        packed: list[bytes] = []

        def add(chunks: Iterator[tuple[KvChunk, object]]) -> None:
            for chunk, _ in chunks:
                packed.append(_CHUNK.pack(chunk.payload_bytes, chunk.crc32c) + bytes(chunk.payload))

        for layer in range(geometry.layers):
            keys, values = heads[0, layer], heads[1, layer]
            # Key norms look at no queries; a capture has to have one.
            capture = LayerCapture(keys[:, -1:], keys, values, 1.0, None, None, layer)
            for segment in encoder.encode(capture):
                add(writer.add(segment))
        add(writer.flush())
        totals = writer.totals()
        head = _HEAD.pack(_MAGIC, totals.chunks, totals.payload_bytes, totals.digest)
        return b"".join([head, *packed])

    def unpack(self, data: memoryview, states: torch.Tensor) -> None:
        """Unpack a chunk.

        Args:
            data: that `pack` made; it may be longer.
            states: `[2, layers, tokens, kv_heads · head_dim]`, which is written.

        Raises:
            DataLossError: the data is damaged, or is a chunk of another shape.
        """
        geometry = self.geometry(states.shape, states.dtype)
        slots = _StateSlots(_by_heads(states, geometry))
        reader = ChunkReader(geometry.layers, states.shape[2])
        writer = SegmentWriter(self.plan.decoder(geometry), slots)
        totals, offset = _read_head(data), _HEAD.size
        for sequence in range(totals.chunks):
            if offset + _CHUNK.size > len(data):
                raise DataLossError(f"a packed chunk ends after {len(data)} bytes, within its contents", "missing")
            size, crc = _CHUNK.unpack_from(data, offset)
            offset += _CHUNK.size
            payload = data[offset : offset + size]
            writer.write(reader.read(KvChunk(sequence, crc, (payload,))))
            offset += size
        reader.finish(totals)


@dataclass(frozen=True, eq=False)
class _StateSlots:
    """The slots of one chunk, `[2, layers, kv_heads, tokens, head_dim]`."""

    states: torch.Tensor

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        return self.states[0, layer, :, first:end]

    def values(self, layer: int, first: int, end: int) -> torch.Tensor:
        return self.states[1, layer, :, first:end]

    def drop(self, layer: int, tokens: torch.Tensor) -> None:
        raise DataLossError(f"a packed chunk lacks {len(tokens)} tokens of layer {layer}", "missing")


def _by_heads(states: torch.Tensor, geometry: KvGeometry) -> torch.Tensor:
    """Return a view `[2, layers, kv_heads, tokens, head_dim]`."""
    return states.view(2, geometry.layers, -1, geometry.kv_heads, geometry.head_dim).transpose(2, 3)


def _read_head(data: memoryview) -> ChunkTotals:
    if len(data) < _HEAD.size or bytes(data[:4]) != _MAGIC:
        raise DataLossError(f"these {len(data)} bytes are no packed chunk", "malformed")
    _, chunks, payload_bytes, digest = _HEAD.unpack_from(data)
    return ChunkTotals(chunks, payload_bytes, digest)
