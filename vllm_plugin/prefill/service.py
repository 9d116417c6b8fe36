"""Serves what the outbox holds."""

from collections.abc import Callable, Iterator

import grpc

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import HeadRange
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.rpc.transfer_methods import SERVICE_NAME, add_transfer_servicer, basis_pieces
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.security.tls import TlsFiles, optional_path
from spectrumkv.v1 import transfer_pb2
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.prefill.outbox import Outbox

# Fetches that are served at once; each holds a thread.
STREAMS = 128
# Most ranks that a consumer may say it has.
MOST_RANKS = 1024


class TransferService:
    """Answers consumers.

    Args:
        spec: of the model.
        heads: KV heads of this rank.
        outbox: holds the transfers.
        basis: of all KV heads; None where there is none.
        longest_seconds: that a fetch may take where its caller sets no deadline.
    """

    def __init__(
        self, spec: ModelSpec, heads: HeadRange, outbox: Outbox, basis: Basis | None, longest_seconds: float
    ) -> None:
        self._spec, self._heads, self._outbox, self._basis = spec, heads, outbox, basis
        self._longest_seconds = longest_seconds

    def Fetch(  # noqa: N802  # the name in the .proto
        self, request: transfer_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Hand out a transfer.

        Args:
            request: names it, and who asks.
            context: of the call.

        Yields:
            Serialized `FetchResponse` messages.

        Raises:
            FailedPreconditionError: the consumer has another model.
            NotFoundError: the transfer is over, or did not come in time.
        """
        self._check_model(request)
        consumers = consumers_of(self._heads, request.rank, request.ranks, self._spec.kv_heads)
        with RpcScope(context, self._longest_seconds) as scope:
            scope.on_end(self._outbox.wake)
            yield from self._outbox.fetch(
                request.transfer_id,
                request.request_id,
                request.rank,
                consumers,
                lambda: scope.ended,
                scope.seconds_remaining,
            )

    def Release(  # noqa: N802
        self, request: transfer_pb2.ReleaseRequest, context: grpc.ServicerContext
    ) -> transfer_pb2.ReleaseResponse:
        """Take in that a request will not fetch a transfer.

        Args:
            request: names both.
            context: of the call.

        Returns:
            Nothing.
        """
        self._outbox.release(request.transfer_id, request.request_id)
        return transfer_pb2.ReleaseResponse()

    def GetBasis(  # noqa: N802
        self, request: transfer_pb2.GetBasisRequest, context: grpc.ServicerContext
    ) -> Iterator[transfer_pb2.GetBasisResponse]:
        """Send the basis.

        Args:
            request: names it by its digest.
            context: of the call.

        Yields:
            Its pieces.

        Raises:
            NotFoundError: this process has another one, or none.
        """
        if self._basis is None or request.digest != self._basis.digest:
            raise NotFoundError(f"basis {request.digest.hex()[:16]} is not the one that is used here")
        yield from basis_pieces(self._basis)

    def _check_model(self, request: transfer_pb2.FetchRequest) -> None:
        differences = self._spec.differences(ModelSpec.from_proto(request.model))
        if differences:
            listed = "; ".join(
                f"{one.field} is {one.mine} on prefill and {one.theirs} on decode" for one in differences
            )
            raise FailedPreconditionError(f"prefill and decode serve different models: {listed}")


def consumers_of(heads: HeadRange, rank: int, ranks: int, kv_heads: int) -> int:
    """Count the ranks of a consumer that need a stream of some KV heads.

    Args:
        heads: of the stream.
        rank: of the consumer that asks.
        ranks: of the consumer.
        kv_heads: of the model.

    Returns:
        At least 1.

    Raises:
        InvalidArgumentError: the consumer cannot have so many ranks, or its rank does not need the stream.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise InvalidArgumentError(f"a consumer says that it has {ranks} ranks; allowed: 1 to {MOST_RANKS}")
    if HeadRange.of_rank(rank, ranks, kv_heads).overlap(heads) is None:
        raise InvalidArgumentError(
            f"rank {rank} of {ranks} needs none of the KV heads {heads.first} to {heads.end - 1}"
        )
    return sum(1 for one in range(ranks) if HeadRange.of_rank(one, ranks, kv_heads).overlap(heads) is not None)


def start_server(
    service: TransferService, options: ConnectorOptions, rank: int, count_ended: Callable[[str], None]
) -> tuple[Server, int]:
    """Serve transfers.

    Args:
        service: answers.
        options: of the connector.
        rank: of this worker, which is added to the port.
        count_ended: called with the status code's name at the end of every fetch.

    Returns:
        The server, and its port.

    Raises:
        InvalidArgumentError: a certificate or token cannot be used, or the address is not free.
    """
    tls = None if options.tls_cert is None else TlsFiles.named(options.tls_cert, options.tls_key, options.tls_ca)
    security = ServerSecurity(
        tls=tls,
        verify_clients=tls is not None and options.tls_ca is not None,
        token_file=optional_path(options.token_file),
    )
    server = Server(add_transfer_servicer, service, SERVICE_NAME, STREAMS, count_ended, security=security)
    port = server.bind(f"{options.listen.host}:{options.listen.port + rank}")
    server.start()
    return server, port
