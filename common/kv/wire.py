"""Chunks: how segments are packed into messages, and how a receiver verifies them.

The layout is documented in proto/spectrumkv/v1/kv.proto. `ChunkWriter` packs segments into chunks on the
prefill side; `ChunkReader` checks everything that arrives before it is used.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import crc32c
import numpy as np

from spectrumkv.common.errors import DataLossError, quoted
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, Buffer, KvSegment, parse_segment

# Sequence, payload bytes, CRC-32C.
DIGEST_RECORD = struct.Struct("<III")


@dataclass(frozen=True)
class KvChunk:
    """What one KvChunk message carries.

    Attributes:
        sequence: 0, 1, 2, … within a request.
        crc32c: announced checksum of the payload.
        parts: the payload, in pieces where it is about to be sent and whole where it arrived.
    """

    sequence: int
    crc32c: int
    parts: tuple[Buffer, ...]

    @property
    def payload_bytes(self) -> int:
        """Count the payload's bytes."""
        return sum(len(part) for part in self.parts)

    @property
    def payload(self) -> Buffer:
        """Join the payload; it is not copied where it is in one piece."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    def checksum(self) -> int:
        """Return the payload's actual CRC-32C."""
        return _checksum(self.parts)


@dataclass(frozen=True)
class ChunkTotals:
    """What End says of all chunks: how many, their payload bytes, and a SHA-256 over their checksums."""

    chunks: int
    payload_bytes: int
    digest: bytes


class _Tally:
    """The count and the digest of chunks, made the same way on both sides."""

    def __init__(self) -> None:
        self.chunks = 0
        self.payload_bytes = 0
        self._digest = hashlib.sha256()

    def add(self, chunk: KvChunk) -> None:
        self.chunks += 1
        self.payload_bytes += chunk.payload_bytes
        self._digest.update(DIGEST_RECORD.pack(chunk.sequence, chunk.payload_bytes, chunk.crc32c))

    def totals(self) -> ChunkTotals:
        return ChunkTotals(self.chunks, self.payload_bytes, self._digest.digest())


class ChunkWriter:
    """What packs segments into numbered, checksummed chunks.

    Small segments share a chunk until it holds `target_bytes`, since a message costs about as much as 64 KiB of
    payload whatever its size. A segment is never split: encoders keep segments near the target.

    Args:
        target_bytes: payload at which a chunk is closed.
    """

    def __init__(self, target_bytes: int) -> None:
        self._target_bytes = target_bytes
        self._pending: list[KvSegment] = []
        self._parts: list[Buffer] = []
        self._pending_bytes = 0
        self._tally = _Tally()

    def add(self, segment: KvSegment) -> Iterator[tuple[KvChunk, list[KvSegment]]]:
        """Append a segment.

        Args:
            segment: with a body of the codec.

        Yields:
            The chunks that it completes (none, one or two), each with its segments.
        """
        segment_bytes = segment.wire_bytes
        if self._parts and self._pending_bytes + segment_bytes > MAX_CHUNK_PAYLOAD_BYTES:
            yield self._close()
        self._pending.append(segment)
        self._parts += [segment.header, segment.body.numpy().data]
        self._pending_bytes += segment_bytes
        if self._pending_bytes >= self._target_bytes:
            yield self._close()

    @property
    def pending_bytes(self) -> int:
        """Count the payload bytes of the chunk that is still open."""
        return self._pending_bytes

    def flush(self) -> Iterator[tuple[KvChunk, list[KvSegment]]]:
        """Close the chunk that is still open.

        Yields:
            The chunk with its segments, if there is one.
        """
        if self._parts:
            yield self._close()

    def totals(self) -> ChunkTotals:
        """Return the totals of all chunks yielded so far."""
        return self._tally.totals()

    def _close(self) -> tuple[KvChunk, list[KvSegment]]:
        parts = tuple(self._parts)
        chunk = KvChunk(self._tally.chunks, _checksum(parts), parts)
        segments = self._pending
        self._pending, self._parts, self._pending_bytes = [], [], 0
        self._tally.add(chunk)
        return chunk, segments


class ChunkReader:
    """What checks chunks as they arrive and takes them apart.

    Args:
        layers: layers of the model.
        tokens: tokens of the prompt.
    """

    def __init__(self, layers: int, tokens: int) -> None:
        self._arrived = np.zeros((layers, tokens), dtype=np.bool_)
        self._tally = _Tally()

    def read(self, chunk: KvChunk) -> list[KvSegment]:
        """Check a chunk and take it apart.

        Args:
            chunk: the next one.

        Returns:
            Its segments; their tensors are read-only views of its payload.

        Raises:
            DataLossError: the chunk is out of order, damaged, malformed, or repeats tokens.
        """
        self._check_envelope(chunk)
        self._tally.add(chunk)
        segments = []
        payload, offset = chunk.payload, 0
        while offset < len(payload):
            segment, offset = parse_segment(payload, offset)
            self._mark(segment)
            segments.append(segment)
        return segments

    def finish(self, announced: ChunkTotals) -> None:
        """Check that everything arrived.

        Args:
            announced: what End says.

        Raises:
            DataLossError: totals or digest differ from what the sender announced, or tokens are missing.
        """
        seen = self._tally.totals()
        for name in ("chunks", "payload_bytes", "digest"):
            mine, theirs = getattr(seen, name), getattr(announced, name)
            if mine != theirs:
                raise DataLossError(f"End announces {name} {quoted(theirs)}, but {quoted(mine)} arrived", "totals")
        if not self._arrived.all():
            layer, token = (int(axis[0]) for axis in np.nonzero(~self._arrived))
            missing = int((~self._arrived).sum())
            raise DataLossError(
                f"{missing} token-layers never arrived, the first of them token {token} of layer {layer}",
                "missing",
            )

    def _check_envelope(self, chunk: KvChunk) -> None:
        expected = self._tally.chunks
        if chunk.sequence != expected:
            raise DataLossError(f"chunk {chunk.sequence} arrived where {expected} was due", "sequence")
        if not 0 < chunk.payload_bytes <= MAX_CHUNK_PAYLOAD_BYTES:
            raise DataLossError(
                f"chunk {chunk.sequence} has {chunk.payload_bytes} payload bytes; "
                f"1 to {MAX_CHUNK_PAYLOAD_BYTES} are allowed",
                "size",
            )
        actual = chunk.checksum()
        if actual != chunk.crc32c:
            raise DataLossError(
                f"chunk {chunk.sequence} has CRC-32C {actual:#010x}, announced {chunk.crc32c:#010x}", "crc"
            )

    def _mark(self, segment: KvSegment) -> None:
        layers, tokens = self._arrived.shape
        end = segment.first_token + segment.tiers.numel()
        if segment.layer >= layers or end > tokens:
            raise DataLossError(
                f"a segment holds tokens {segment.first_token} to {end - 1} of layer {segment.layer}; "
                f"the request has {tokens} tokens and {layers} layers",
                "range",
            )
        span = self._arrived[segment.layer, segment.first_token : end]
        if span.any():
            raise DataLossError(
                f"tokens {segment.first_token} to {end - 1} of layer {segment.layer} overlap tokens that came before",
                "repeated",
            )
        span[:] = True


def _checksum(parts: Iterable[Buffer]) -> int:
    """Return the CRC-32C of the parts as one."""
    crc = 0
    for part in parts:
        crc = crc32c.crc32c(part, crc)
    return crc
