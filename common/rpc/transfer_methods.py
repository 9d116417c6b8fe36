"""The methods of the transfer service: how a consumer calls them, and how a server registers them.

Chunks cross as in the Decode stream, without needless copies; see `decode_stream`.
"""

from collections.abc import Iterator
from typing import Any

import grpc

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_methods import BASIS_PIECE_BYTES
from spectrumkv.common.rpc.decode_stream import read_message
from spectrumkv.v1 import transfer_pb2

SERVICE_NAME = "spectrumkv.v1.KvTransferService"

ArrivedMessage = transfer_pb2.FetchResponse | KvChunk | DataLossError


def begin_fetch(channel: grpc.Channel, request: transfer_pb2.FetchRequest, timeout: float) -> Any:
    """Begin to fetch a transfer.

    Args:
        channel: to the producer.
        request: names the transfer.
        timeout: seconds that the call may take, waiting for the transfer to come included.

    Returns:
        The call of grpc: it yields `ArrivedMessage`, and `cancel` ends it.
    """
    method = channel.unary_stream(
        f"/{SERVICE_NAME}/Fetch",
        request_serializer=transfer_pb2.FetchRequest.SerializeToString,
        response_deserializer=_arrived,
    )
    return method(request, timeout=timeout)


def expect_header(messages: Iterator[ArrivedMessage]) -> transfer_pb2.TransferHeader:
    """Return what a transfer begins with.

    Args:
        messages: what `begin_fetch` returned, from the first one on.

    Returns:
        The header.

    Raises:
        DataLossError: it is damaged, or another message comes first.
    """
    first = next(messages, None)
    if isinstance(first, DataLossError):
        raise first
    if first is None or isinstance(first, KvChunk) or first.WhichOneof("message") != "header":
        raise DataLossError("a transfer does not begin with its header", "sequence")
    return first.header


def chunks_until_end(messages: Iterator[ArrivedMessage]) -> Iterator[KvChunk | transfer_pb2.FetchResponse]:
    """Yield what follows the header of a transfer, and read on to the status, which tells the producer that all came.

    Args:
        messages: what `begin_fetch` returned, after the header.

    Yields:
        Chunks as they arrive, then the message with End.

    Raises:
        DataLossError: a message is damaged or out of order, or the transfer stops before its End.
    """
    ended = False
    for message in messages:
        if isinstance(message, DataLossError):
            raise message
        if ended:
            raise DataLossError(f"a transfer goes on after its end: {type(message).__name__}", "sequence")
        if isinstance(message, KvChunk):
            yield message
            continue
        if message.WhichOneof("message") != "end":
            raise DataLossError("a transfer has a second header", "sequence")
        ended = True
        yield message
    if not ended:
        raise DataLossError("a transfer ended without its end", "sequence")


def release(channel: grpc.Channel, request: transfer_pb2.ReleaseRequest, timeout: float) -> Any:
    """Begin to give a transfer up.

    Args:
        channel: to the producer.
        request: names the transfer.
        timeout: seconds that the call may take.

    Returns:
        A future of grpc.
    """
    method = channel.unary_unary(
        f"/{SERVICE_NAME}/Release",
        request_serializer=transfer_pb2.ReleaseRequest.SerializeToString,
        response_deserializer=transfer_pb2.ReleaseResponse.FromString,
    )
    return method.future(request, timeout=timeout)


def get_basis(channel: grpc.Channel, digest: bytes, timeout: float) -> Iterator[transfer_pb2.GetBasisResponse]:
    """Ask for a basis.

    Args:
        channel: to the producer.
        digest: of the basis.
        timeout: seconds that the call may take.

    Returns:
        Its pieces, as they arrive.
    """
    method = channel.unary_stream(
        f"/{SERVICE_NAME}/GetBasis",
        request_serializer=transfer_pb2.GetBasisRequest.SerializeToString,
        response_deserializer=transfer_pb2.GetBasisResponse.FromString,
    )
    pieces: Iterator[transfer_pb2.GetBasisResponse] = method(
        transfer_pb2.GetBasisRequest(digest=digest), timeout=timeout
    )
    return pieces


def basis_pieces(basis: Basis) -> Iterator[transfer_pb2.GetBasisResponse]:
    """Cut a basis into messages.

    Args:
        basis: to send.

    Yields:
        Its pieces in order.
    """
    data, digest = basis.serialized, basis.digest
    for start in range(0, len(data), BASIS_PIECE_BYTES):
        yield transfer_pb2.GetBasisResponse(digest=digest, part=data[start : start + BASIS_PIECE_BYTES])


def add_transfer_servicer(servicer: Any, server: grpc.Server) -> None:
    """Register a servicer of the transfer service.

    Args:
        servicer: its `Fetch` yields messages that are serialized already.
        server: serves it.
    """
    handlers = {
        "Fetch": grpc.unary_stream_rpc_method_handler(
            servicer.Fetch, request_deserializer=transfer_pb2.FetchRequest.FromString, response_serializer=bytes
        ),
        "Release": grpc.unary_unary_rpc_method_handler(
            servicer.Release,
            request_deserializer=transfer_pb2.ReleaseRequest.FromString,
            response_serializer=transfer_pb2.ReleaseResponse.SerializeToString,
        ),
        "GetBasis": grpc.unary_stream_rpc_method_handler(
            servicer.GetBasis,
            request_deserializer=transfer_pb2.GetBasisRequest.FromString,
            response_serializer=transfer_pb2.GetBasisResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def _arrived(data: bytes) -> ArrivedMessage:
    try:
        return read_message(data, transfer_pb2.FetchResponse)
    except DataLossError as error:
        return error
