"""The methods of the decode service: how prefill calls them, and how a server registers them.

They differ from the generated ones in the messages of the Decode stream, which `decode_stream` reads and writes.
"""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.rpc.decode_stream import (
    ArrivedRequest,
    ArrivedResponse,
    deserialize_request,
    deserialize_response,
    serialize_request,
    serialize_response,
)
from spectrumkv.common.telemetry.tracing import current_trace
from spectrumkv.v1 import decode_pb2

SERVICE_NAME = "spectrumkv.v1.DecodeService"
BASIS_PIECE_BYTES = 512 << 10

ArrivedPiece = decode_pb2.PutBasisRequest | DataLossError


def open_decode_stream(channel: grpc.Channel) -> Callable[..., Any]:
    """Return what starts a Decode RPC: call it with an iterator of requests and a timeout.

    The RPC yields `ArrivedResponse`.
    """
    stream: Callable[..., Any] = channel.stream_stream(
        f"/{SERVICE_NAME}/Decode",
        request_serializer=serialize_request,
        response_deserializer=_arrived_response,
    )
    return stream


def begin_basis(channel: grpc.Channel, basis: Basis, timeout: float | None) -> tuple[Any, int]:
    """Begin to send a codec basis to a decode worker.

    Args:
        channel: to the worker.
        basis: the basis.
        timeout: seconds that the call may take; None is forever.

    Returns:
        The call, a future of grpc whose `result` waits for the worker, and how many bytes all messages have.
    """
    data, digest = basis.serialized, basis.digest
    pieces = [
        decode_pb2.PutBasisRequest(digest=digest, part=data[start : start + BASIS_PIECE_BYTES])
        for start in range(0, len(data), BASIS_PIECE_BYTES)
    ]
    return _begin_upload(channel, pieces, timeout), sum(piece.ByteSize() for piece in pieces)


def ask_for_basis(channel: grpc.Channel, basis: Basis, timeout: float | None) -> Any:
    """Ask a decode worker whether it has a codec basis.

    Args:
        channel: to the worker.
        basis: the basis.
        timeout: seconds that the call may take; None is forever.

    Returns:
        The call, a future of grpc whose `result` raises the status FAILED_PRECONDITION with the details of a missing
        basis where the worker lacks it.
    """
    return _begin_upload(channel, [decode_pb2.PutBasisRequest(digest=basis.digest)], timeout)


def _begin_upload(channel: grpc.Channel, pieces: list[decode_pb2.PutBasisRequest], timeout: float | None) -> Any:
    method = channel.stream_unary(
        f"/{SERVICE_NAME}/PutBasis",
        request_serializer=decode_pb2.PutBasisRequest.SerializeToString,
        response_deserializer=decode_pb2.PutBasisResponse.FromString,
    )
    return method.future(iter(pieces), timeout=timeout, metadata=current_trace().metadata)


def decode_info_method(channel: grpc.Channel) -> Callable[..., Any]:
    """Return what calls GetServerInfo, which tells what a decode service serves and how full it is."""
    method: Callable[..., Any] = channel.unary_unary(
        f"/{SERVICE_NAME}/GetServerInfo",
        request_serializer=decode_pb2.DecodeServiceGetServerInfoRequest.SerializeToString,
        response_deserializer=decode_pb2.DecodeServiceGetServerInfoResponse.FromString,
    )
    return method


def add_decode_servicer(servicer: Any, server: grpc.Server) -> None:
    """Register a servicer of the decode service.

    Args:
        servicer: its `Decode` gets an iterator of `ArrivedRequest`, its `PutBasis` one of `ArrivedPiece`.
        server: serves it.
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
