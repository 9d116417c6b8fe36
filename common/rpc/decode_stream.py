"""The messages of the Decode stream as bytes: chunks without needless copies, all others with a checksum at the end.

Protobuf copies a bytes field when a message is built, when it is serialized, when it is parsed and at each access.
Chunks carry the KV, so this module writes and reads their bytes itself, as exactly the protobuf encoding of
`DecodeRequest { chunk { … } }`: any other implementation of the contract can be the peer. ADR 0102 has the figures.

A chunk has a checksum of its payload. All other messages (Begin, End, Admitted, tokens, Finished) end with the field
`crc32c`, the CRC-32C of all bytes before it, so that a flipped prompt token, seed or generated token is noticed
before it is used.

Where a message cannot be read, gRPC would end the RPC with INTERNAL before a handler hears of it. Damage is DATA_LOSS
and is counted, so the handler gets the error to raise in place of the message.
"""

from typing import TypeVar

import crc32c
from google.protobuf.message import DecodeError, Message

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.v1 import decode_pb2, kv_pb2

# Protobuf tags: field number · 8 + wire type (0 varint, 2 length-delimited, 5 four bytes).
_CHUNK_TAG = 2 << 3 | 2
_SEQUENCE_TAG = 1 << 3 | 0
_CRC_TAG = 2 << 3 | 5
_PAYLOAD_TAG = 3 << 3 | 2
_LONGEST_VARINT = 5
# Field 15, four bytes: the highest number of the two messages, so that every implementation writes it last.
_CHECKSUM_TAG = 15 << 3 | 5
CHECKSUM_BYTES = 5

M = TypeVar("M", bound=Message)

Request = decode_pb2.DecodeRequest | KvChunk
ArrivedRequest = Request | DataLossError
ArrivedResponse = decode_pb2.DecodeResponse | DataLossError


def serialized_bytes(request: Request) -> int:
    """Return how many bytes `serialize_request` makes of a request."""
    if isinstance(request, KvChunk):
        return len(_chunk_prefix(request)) + request.payload_bytes
    return request.ByteSize() + CHECKSUM_BYTES


def serialize_request(request: Message | KvChunk) -> bytes:
    """Write a message of a stream that carries chunks as field 2; a chunk's payload is copied once.

    Args:
        request: a chunk, or a message that has a field `crc32c` of number 15 and no higher ones.

    Returns:
        The protobuf encoding, with a checksum at the end where the request is no chunk.
    """
    if isinstance(request, KvChunk):
        return b"".join((_chunk_prefix(request), *request.parts))
    return append_checksum(request.SerializeToString())


def deserialize_request(data: bytes) -> Request:
    """Read a message of the Decode stream; see `read_message`.

    Args:
        data: as it arrived.

    Returns:
        The message; a chunk's payload is a view of `data`.
    """
    return read_message(data, decode_pb2.DecodeRequest)


def read_message(data: bytes, kind: type[M]) -> M | KvChunk:
    """Read what `serialize_request` wrote.

    Args:
        data: as it arrived.
        kind: of the messages that are no chunks: one with a field `crc32c`, whose `message` may be a chunk.

    Returns:
        The message; a chunk's payload is a view of `data`.

    Raises:
        DataLossError: `data` is no such message, or its checksum is wrong.
    """
    chunk = _parse_chunk(data)
    if chunk is not None:
        return chunk
    try:
        message = kind.FromString(data)
        if message.WhichOneof("message") == "chunk":
            # Fields in another order, or unknown ones between them: valid protobuf all the same.
            unusual: kv_pb2.KvChunk = message.chunk  # type: ignore[attr-defined]
            return KvChunk(unusual.sequence, unusual.crc32c, (unusual.payload,))
        return kind.FromString(split_checksum(data))
    except DecodeError:
        raise DataLossError(f"a message of {len(data)} bytes is no {kind.DESCRIPTOR.name}", "malformed") from None


def serialize_response(response: decode_pb2.DecodeResponse) -> bytes:
    """Return the response's protobuf encoding, with a checksum at the end."""
    return append_checksum(response.SerializeToString())


def deserialize_response(data: bytes) -> decode_pb2.DecodeResponse:
    """Read what `serialize_response` wrote.

    Args:
        data: as it arrived.

    Returns:
        The message, without its checksum.

    Raises:
        DataLossError: `data` is no DecodeResponse, or its checksum is wrong.
    """
    try:
        return decode_pb2.DecodeResponse.FromString(split_checksum(data))
    except DecodeError:
        raise DataLossError(f"a message of {len(data)} bytes is no DecodeResponse", "malformed") from None


def append_checksum(encoded: bytes) -> bytes:
    """Append the field `crc32c` to a message.

    Args:
        encoded: a DecodeRequest or DecodeResponse without the field.

    Returns:
        The encoding with the field at its end, `CHECKSUM_BYTES` longer.
    """
    checksum: int = crc32c.crc32c(encoded)
    return encoded + bytes((_CHECKSUM_TAG,)) + checksum.to_bytes(4, "little")


def split_checksum(data: bytes) -> bytes:
    """Return a message without the checksum at its end.

    Raises:
        DataLossError: the checksum is missing, or is not the one of the bytes before it.
    """
    encoded, tag, announced = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:-4], data[-4:]
    if tag != bytes((_CHECKSUM_TAG,)):
        raise DataLossError(f"a message of {len(data)} bytes does not end with its checksum", "malformed")
    actual = crc32c.crc32c(encoded)
    if actual != int.from_bytes(announced, "little"):
        raise DataLossError(
            f"a message of {len(data)} bytes has CRC-32C {actual:#010x}, "
            f"announced {int.from_bytes(announced, 'little'):#010x}",
            "crc",
        )
    return encoded


def _chunk_prefix(chunk: KvChunk) -> bytes:
    """Return the encoding without the payload, which comes last; as in protobuf, fields that are 0 are left out."""
    inner = bytearray()
    if chunk.sequence:
        inner += bytes((_SEQUENCE_TAG,)) + _varint(chunk.sequence)
    if chunk.crc32c:
        inner += bytes((_CRC_TAG,)) + chunk.crc32c.to_bytes(4, "little")
    if chunk.payload_bytes:
        inner += bytes((_PAYLOAD_TAG,)) + _varint(chunk.payload_bytes)
    return bytes((_CHUNK_TAG,)) + _varint(len(inner) + chunk.payload_bytes) + bytes(inner)


def _parse_chunk(data: bytes) -> KvChunk | None:
    """Return a chunk if its fields are in the order in which protobuf writes them; None for everything else."""
    fields = _Cursor(data)
    if not fields.at(_CHUNK_TAG) or fields.varint() != fields.remaining:
        return None
    sequence = fields.varint() if fields.at(_SEQUENCE_TAG) else 0
    crc32c = fields.four_bytes() if fields.at(_CRC_TAG) else 0
    if not fields.at(_PAYLOAD_TAG) or fields.varint() != fields.remaining:
        return None
    if sequence is None or crc32c is None or sequence >= 1 << 32:
        return None
    return KvChunk(sequence, crc32c, (fields.rest(),))


class _Cursor:
    """Reads protobuf's primitives from the front of a message."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def remaining(self) -> int:
        return len(self._data) - self._position

    def at(self, tag: int) -> bool:
        """Return whether `tag` comes next, and step over it if so."""
        found = self.remaining > 0 and self._data[self._position] == tag
        self._position += found
        return found

    def varint(self) -> int | None:
        value = 0
        for index, byte in enumerate(self._data[self._position : self._position + _LONGEST_VARINT]):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                self._position += index + 1
                return value
        return None

    def four_bytes(self) -> int | None:
        if self.remaining < 4:
            return None
        self._position += 4
        return int.from_bytes(self._data[self._position - 4 : self._position], "little")

    def rest(self) -> memoryview:
        return memoryview(self._data)[self._position :]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
