"""The Decode stream without needless copies of KV.

Protobuf copies a bytes field when a message is built, when it is serialized, when it is parsed and at each access.
A chunk is the one message where that matters, so its bytes are written and read by hand here, as exactly the
protobuf encoding of `DecodeRequest { chunk { … } }`: any other implementation of the contract can be the peer.

gRPC ends an RPC with INTERNAL where a message cannot be read, before a handler hears of it. Damage is DATA_LOSS and
is counted, so what arrives damaged is handed on in the place of a message: as the error to raise.
"""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.message_checksum import CHECKSUM_BYTES, append_checksum, split_checksum
from spectrumkv.common.telemetry.tracing import current_trace
from spectrumkv.v1 import decode_pb2

SERVICE_NAME = "spectrumkv.v1.DecodeService"
_DECODE_METHOD = f"/{SERVICE_NAME}/Decode"

# Protobuf tags: field number · 8 + wire type (0 varint, 2 length-delimited, 5 four bytes).
_CHUNK_TAG = 2 << 3 | 2
_SEQUENCE_TAG = 1 << 3 | 0
_CRC_TAG = 2 << 3 | 5
_PAYLOAD_TAG = 3 << 3 | 2
_LONGEST_VARINT = 5
BASIS_PIECE_BYTES = 512 << 10

Request = decode_pb2.DecodeRequest | KvChunk
ArrivedRequest = Request | DataLossError
ArrivedPiece = decode_pb2.PutBasisRequest | DataLossError
ArrivedResponse = decode_pb2.DecodeResponse | DataLossError


def open_decode_stream(channel: grpc.Channel) -> Callable[..., Any]:
    """Return what starts a Decode RPC: call it with an iterator of requests and a timeout.

    The RPC yields `ArrivedResponse`.
    """
    stream: Callable[..., Any] = channel.stream_stream(
        _DECODE_METHOD,
        request_serializer=serialize_request,
        response_deserializer=_arrived_response,
    )
    return stream


def begin_basis(channel: grpc.Channel, basis: SpectralBasis, timeout: float | None) -> tuple[Any, int]:
    """Begin to send a codec basis to a decode worker.

    Returns:
        The call, a future of grpc whose `result` waits for the worker, and how many bytes are serialized.
    """
    data, digest = basis.serialized, basis.digest
    pieces = [
        decode_pb2.PutBasisRequest(digest=digest, part=data[start : start + BASIS_PIECE_BYTES])
        for start in range(0, len(data), BASIS_PIECE_BYTES)
    ]
    method = channel.stream_unary(
        f"/{SERVICE_NAME}/PutBasis",
        request_serializer=decode_pb2.PutBasisRequest.SerializeToString,
        response_deserializer=decode_pb2.PutBasisResponse.FromString,
    )
    call = method.future(iter(pieces), timeout=timeout, metadata=current_trace().metadata)
    return call, sum(piece.ByteSize() for piece in pieces)


def put_basis(channel: grpc.Channel, basis: SpectralBasis) -> None:
    """Send a codec basis to a decode worker, however long that takes.

    Raises:
        grpc.RpcError: the worker refused it, or could not be reached.
    """
    call, _ = begin_basis(channel, basis, timeout=None)
    call.result()


def decode_info_method(channel: grpc.Channel) -> Callable[..., Any]:
    """Return what asks a decode service what it serves and how full it is."""
    method: Callable[..., Any] = channel.unary_unary(
        f"/{SERVICE_NAME}/GetServerInfo",
        request_serializer=decode_pb2.DecodeServiceGetServerInfoRequest.SerializeToString,
        response_deserializer=decode_pb2.DecodeServiceGetServerInfoResponse.FromString,
    )
    return method


def add_decode_servicer(servicer: Any, server: grpc.Server) -> None:
    """Register a servicer.

    Its `Decode` gets `ArrivedRequest`, a chunk as `KvChunk` and other requests as messages; its `PutBasis` gets
    `ArrivedPiece`.
    """
    handlers = {
        "Decode": grpc.stream_stream_rpc_method_handler(
            servicer.Decode,
            request_deserializer=_arrived_request,
            response_serializer=serialize_response,
        ),
        "PutBasis": grpc.stream_unary_rpc_method_handler(
            servicer.PutBasis,
            request_deserializer=_arrived_piece,
            response_serializer=decode_pb2.PutBasisResponse.SerializeToString,
        ),
        "GetServerInfo": grpc.unary_unary_rpc_method_handler(
            servicer.GetServerInfo,
            request_deserializer=decode_pb2.DecodeServiceGetServerInfoRequest.FromString,
            response_serializer=decode_pb2.DecodeServiceGetServerInfoResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def serialized_bytes(request: Request) -> int:
    """Length of the request as `serialize_request` writes it."""
    if isinstance(request, KvChunk):
        return len(_chunk_prefix(request)) + request.payload_bytes
    return request.ByteSize() + CHECKSUM_BYTES


def serialize_request(request: Request) -> bytes:
    """Return the request's protobuf encoding, sealed if it is no chunk; a chunk's payload is copied once."""
    if isinstance(request, KvChunk):
        return b"".join((_chunk_prefix(request), *request.parts))
    return append_checksum(request.SerializeToString())


def deserialize_request(data: bytes) -> Request:
    """Inverse of `serialize_request`; a chunk's payload is a view of `data`.

    Raises:
        DataLossError: `data` is no DecodeRequest, or its append_checksum is broken.
    """
    chunk = _parse_chunk(data)
    if chunk is not None:
        return chunk
    try:
        request = decode_pb2.DecodeRequest.FromString(data)
        if request.WhichOneof("message") == "chunk":
            # Fields in another order, or unknown ones between them: valid protobuf all the same.
            return KvChunk(request.chunk.sequence, request.chunk.crc32c, (request.chunk.payload,))
        return decode_pb2.DecodeRequest.FromString(split_checksum(data))
    except DecodeError:
        raise DataLossError(f"a message of {len(data)} bytes is no DecodeRequest", "malformed") from None


def serialize_response(response: decode_pb2.DecodeResponse) -> bytes:
    """Return the response's protobuf encoding, sealed."""
    return append_checksum(response.SerializeToString())


def deserialize_response(data: bytes) -> decode_pb2.DecodeResponse:
    """Inverse of `serialize_response`.

    Raises:
        DataLossError: `data` is no DecodeResponse, or its append_checksum is broken.
    """
    try:
        return decode_pb2.DecodeResponse.FromString(split_checksum(data))
    except DecodeError:
        raise DataLossError(f"a message of {len(data)} bytes is no DecodeResponse", "malformed") from None


def _arrived_request(data: bytes) -> ArrivedRequest:
    try:
        return deserialize_request(data)
    except DataLossError as error:
        return error


def _arrived_piece(data: bytes) -> ArrivedPiece:
    try:
        return decode_pb2.PutBasisRequest.FromString(data)
    except DecodeError:
        return DataLossError(f"a message of {len(data)} bytes is no PutBasisRequest", "malformed")


def _arrived_response(data: bytes) -> ArrivedResponse:
    try:
        return deserialize_response(data)
    except DataLossError as error:
        return error


def _chunk_prefix(chunk: KvChunk) -> bytes:
    """All of the message but the payload, which comes last. Zeros are left out, as protobuf does."""
    inner = bytearray()
    if chunk.sequence:
        inner += bytes((_SEQUENCE_TAG,)) + _varint(chunk.sequence)
    if chunk.crc32c:
        inner += bytes((_CRC_TAG,)) + chunk.crc32c.to_bytes(4, "little")
    if chunk.payload_bytes:
        inner += bytes((_PAYLOAD_TAG,)) + _varint(chunk.payload_bytes)
    return bytes((_CHUNK_TAG,)) + _varint(len(inner) + chunk.payload_bytes) + bytes(inner)


def _parse_chunk(data: bytes) -> KvChunk | None:
    """Read a chunk whose fields are in the order in which protobuf writes them; None if it is anything else."""
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
        """Whether `tag` comes next; if so it is passed."""
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
