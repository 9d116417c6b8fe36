"""Connect to prefill services from asyncio; `client` is the same for threads.

async with AsyncSpectrumClient("127.0.0.1:50051") as client:
    async with client.send(Request(prompt="The capital of France is")) as stream:
        async for event in stream:
            print(event.text, end="", flush=True)
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.client.argument_types import check_type, grpc_timeout
from spectrumkv.client.client import DEFAULT_TIMEOUT_SECONDS, INFO_TIMEOUT_SECONDS
from spectrumkv.client.completion import Completion, TokenEvent
from spectrumkv.client.received import ReceivedAnswer
from spectrumkv.client.request import Request
from spectrumkv.common.rpc.attempts import RepeatedAsyncStream, repeated_async
from spectrumkv.common.rpc.channel import open_async_channel
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.security.tokens import METADATA_KEY
from spectrumkv.common.telemetry.tracing import TraceContext
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc

T = TypeVar("T")


class AsyncCompletionStream:
    """Iterate over the tokens of one request as they arrive; leaving its `async with` block cancels the request.

    Args:
        call: the running RPC, which may be made again before its first answer.
        received: checks and keeps what arrives of it.
    """

    def __init__(self, call: Any, received: ReceivedAnswer) -> None:
        self._call = call
        self._received = received

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yield each token when it arrives.

        Raises:
            SpectrumKVError: the server ended the request with an error (the class corresponds to the status), or
                its answer breaks the protocol.
        """
        try:
            async for response in self._call:
                token = self._received.accept(response)
                if token is not None:
                    yield token
        except grpc.RpcError as error:
            raise self._received.error_of(error) from error
        self._received.check_ended()

    async def result(self) -> Completion:
        """Return the whole completion, after waiting for the remaining tokens.

        Raises:
            SpectrumKVError: see `__aiter__`.
            InternalError: the stream was read before, and ended without a result.
        """
        async for _ in self:
            pass
        return self._received.completion()

    @property
    def received(self) -> ReceivedAnswer:
        """What has arrived so far."""
        return self._received

    def cancel(self) -> None:
        """Cancel the request, so that both services free its memory. A request that has ended is left as it is."""
        self._call.cancel()

    async def __aenter__(self) -> "AsyncCompletionStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncSpectrumClient:
    """Hold connections to prefill services, for one event loop; `async with` or `close` ends them.

    Args:
        address: "host:port" of a prefill service, or numeric addresses of several, separated by commas.
        security: how the server is verified and which credentials it is sent; by default plaintext, to this machine
            only.
        own_token: whether calls that are given no `authorization` bring the token of `security`. A process that calls
            on behalf of others sets it to False, since it would lend them its token.

    Raises:
        InvalidArgumentError: the address is malformed, a certificate or token cannot be used, or plaintext would
            leave this machine.
    """

    def __init__(
        self,
        address: str,
        security: ChannelSecurity = ChannelSecurity(),  # noqa: B008  # frozen
        own_token: bool = True,
    ) -> None:
        check_type("the server's address", address, str)
        self.address = address
        self._channel = open_async_channel(address, security)
        self._several = Target.parse(address).is_several
        self._token = security.token() if own_token else None

    async def __aenter__(self) -> "AsyncSpectrumClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; requests that are still running are cancelled."""
        await self._channel.close()

    def send(
        self,
        request: Request,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        trace: TraceContext = TraceContext(),  # noqa: B008  # frozen
        authorization: str | None = None,
    ) -> AsyncCompletionStream:
        """Send a request and return the stream of its completion.

        Args:
            request: prompt, sampling and KV choice.
            timeout: seconds until the whole request ends with DeadlineExceededError; infinity is none.
            trace: the trace that the request is part of; both services log its id.
            authorization: the value of that header for this call, such as "Bearer …"; None takes the client's own.

        Returns:
            The stream of tokens.

        Raises:
            InvalidArgumentError: the timeout is not a number above 0.
        """
        seconds = grpc_timeout(timeout)
        message = request.to_proto()
        received = ReceivedAnswer(timeout, self.address)
        metadata = (*trace.metadata, *self._credentials(authorization))

        def begin(left: float | None) -> Any:
            return self._prefill.Generate(message, timeout=left, metadata=metadata)

        return AsyncCompletionStream(RepeatedAsyncStream(begin, seconds, self._several), received)

    async def server_info(
        self, timeout: float = INFO_TIMEOUT_SECONDS, authorization: str | None = None
    ) -> prefill_pb2.PrefillServiceGetServerInfoResponse:
        """Return what a prefill service says of itself: which model it serves, and how.

        Args:
            timeout: seconds until the call is given up.
            authorization: as for `send`.

        Raises:
            SpectrumKVError: the server cannot be reached, or refuses.
        """
        request = prefill_pb2.PrefillServiceGetServerInfoRequest()
        return await self._ask(lambda prefill: prefill.GetServerInfo, request, timeout, authorization)

    async def tokenize(
        self, request: Request, timeout: float = INFO_TIMEOUT_SECONDS, authorization: str | None = None
    ) -> prefill_pb2.TokenizeResponse:
        """Return the token ids that a request's prompt has.

        Args:
            request: of which prompt and model are read.
            timeout: seconds until the call is given up.
            authorization: as for `send`.

        Raises:
            SpectrumKVError: the server cannot be reached, or refuses.
        """
        asked = prefill_pb2.TokenizeRequest(request=request.to_proto())
        return await self._ask(lambda prefill: prefill.Tokenize, asked, timeout, authorization)

    async def detokenize(
        self,
        token_ids: list[int],
        model: str | None = None,
        timeout: float = INFO_TIMEOUT_SECONDS,
        authorization: str | None = None,
    ) -> prefill_pb2.DetokenizeResponse:
        """Return the text of token ids, of all together and of each.

        Args:
            token_ids: any of the model's.
            model: the name of the model that the server must serve; None accepts any.
            timeout: seconds until the call is given up.
            authorization: as for `send`.

        Raises:
            SpectrumKVError: the server cannot be reached, or refuses.
        """
        asked = prefill_pb2.DetokenizeRequest(token_ids=token_ids, model=model or "")
        return await self._ask(lambda prefill: prefill.Detokenize, asked, timeout, authorization)

    async def is_serving(self, timeout: float = INFO_TIMEOUT_SECONDS) -> bool:
        """Return whether the server's standard health check says SERVING.

        Raises:
            SpectrumKVError: the server cannot be reached or has no health service.
        """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
        stub = health_pb2_grpc.HealthStub(self._channel.current)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=grpc_timeout(timeout))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    @property
    def _prefill(self) -> Any:
        # Generated stubs carry no types.
        return prefill_pb2_grpc.PrefillServiceStub(self._channel.current)  # type: ignore[no-untyped-call]

    async def _ask(
        self,
        method: Callable[[Any], Callable[..., Awaitable[T]]],
        message: Any,
        timeout: float,
        authorization: str | None,
    ) -> T:
        seconds = grpc_timeout(timeout)
        try:
            return await repeated_async(
                lambda left: method(self._prefill)(message, timeout=left, metadata=self._credentials(authorization)),
                seconds,
                self._several,
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def _credentials(self, authorization: str | None) -> tuple[tuple[str, str], ...]:
        if authorization is not None:
            return ((METADATA_KEY, authorization),)
        return () if self._token is None else ((METADATA_KEY, f"Bearer {self._token()}"),)
