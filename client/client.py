"""Connect to a SpectrumKV server, send requests, and read their tokens as they arrive.

with SpectrumClient("127.0.0.1:50051") as client:
    stream = client.generate("The capital of France is", sampling=Sampling(max_tokens=8))
    for event in stream:
        print(event.text, end="", flush=True)
    print(stream.result().usage.budget_counted)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc

from spectrumkv.client.argument_types import check_type, grpc_timeout
from spectrumkv.client.completion import Completion, PromptToken, TokenEvent
from spectrumkv.client.received import ReceivedAnswer
from spectrumkv.client.request import KvChoice, Prompt, Request, Sampling
from spectrumkv.client.tools import Tools
from spectrumkv.common.errors import FailedPreconditionError, NotFoundError
from spectrumkv.common.rpc import readiness
from spectrumkv.common.rpc.attempts import RepeatedStream, repeated
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.telemetry.tracing import TraceContext
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

DEFAULT_TIMEOUT_SECONDS = 600.0
INFO_TIMEOUT_SECONDS = 10.0

ServerInfo = prefill_pb2.PrefillServiceGetServerInfoResponse | decode_pb2.DecodeServiceGetServerInfoResponse


class CompletionStream:
    """Iterate over the tokens of one request as they arrive; `result` returns the whole completion.

    Args:
        call: the running RPC, which may be made again before its first answer.
        received: checks and keeps what arrives of it.
    """

    def __init__(self, call: Any, received: ReceivedAnswer) -> None:
        self._call = call
        self._received = received

    def __iter__(self) -> "CompletionStream":
        return self

    def __next__(self) -> TokenEvent:
        """Return the next token, after waiting for it.

        Raises:
            SpectrumKVError: the server ended the request with an error (the class corresponds to the status), or
                its answer breaks the protocol.
        """  # noqa: DOC501  # the rule wants `error_of` itself; it makes a SpectrumKVError
        while True:
            try:
                response = next(self._call)
            except StopIteration:
                self._received.check_ended()
                raise
            except grpc.RpcError as error:
                raise self._received.error_of(error) from error
            token = self._received.accept(response)
            if token is not None:
                return token

    def result(self) -> Completion:
        """Return the whole completion, after waiting for the remaining tokens.

        Raises:
            SpectrumKVError: see `__next__`.
            InternalError: the stream was read before, and ended without a result.
        """
        for _ in self:
            pass
        return self._received.completion()

    @property
    def prompt_tokens(self) -> tuple[PromptToken, ...]:
        """The prompt's tokens, where the request asked for them; complete once the first token has arrived."""
        return self._received.prompt_tokens

    def cancel(self) -> None:
        """Cancel the request, so that both services free its memory. A request that has ended is left as it is."""
        self._call.cancel()

    def __enter__(self) -> "CompletionStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class SpectrumClient:
    """Hold a connection to one server; threads may share it, and `with` or `close` ends it.

    Args:
        address: "host:port" of a prefill service (`server_info` works on a decode service too), or numeric addresses
            of several, separated by commas. Where there are several, or the host is a name, which may have several
            addresses, each request goes to a service that is up, in turn, and is sent to another one if that fails
            before the first token. gRPC's "dns:///host:port" is the same as "host:port".
        security: how the server is verified and which credentials it is sent; by default plaintext, to this machine
            only.

    After `close`, methods that call the server raise FailedPreconditionError, and a wait that is still running raises
    CancelledError.

    Raises:
        InvalidArgumentError: the address is malformed, a certificate or token cannot be used, or plaintext would
            leave this machine.
    """

    def __init__(self, address: str, security: ChannelSecurity = ChannelSecurity()) -> None:  # noqa: B008  # frozen
        check_type("the server's address", address, str)
        self.address = address
        self._closed = False
        self._channel = open_channel(address, security)
        self._several = Target.parse(address).is_several
        # Generated stubs carry no types.
        self._prefill: Any = prefill_pb2_grpc.PrefillServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._decode: Any = decode_pb2_grpc.DecodeServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> "SpectrumClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; requests that are still running are cancelled."""
        self._closed = True
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        kv: KvChoice = KvChoice(),  # noqa: B008  # frozen
        model: str | None = None,
        request_id: str | None = None,
        tools: Tools = Tools(),  # noqa: B008  # frozen
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        trace: TraceContext = TraceContext(),  # noqa: B008  # frozen
    ) -> CompletionStream:
        """Send a prompt and return the stream of its completion.

        Args:
            prompt: text, messages, or token ids.
            sampling: how tokens are sampled.
            kv: how the KV cache is sent from prefill to decode.
            model: the name of the model that the server must serve; None accepts any.
            request_id: identifies the request in both services' logs; None lets the server draw one.
            tools: the functions that the model may call; they need a prompt of messages.
            timeout: seconds until the whole request ends with DeadlineExceededError; infinity is none.
            trace: the trace that the request is part of; both services log its id.

        Returns:
            The stream of tokens.

        Raises:
            InvalidArgumentError: an argument has another type, or is a text that UTF-8 cannot encode. If the server
                refuses the request, the stream raises the error.
        """
        request = Request(prompt=prompt, sampling=sampling, kv=kv, model=model, request_id=request_id, tools=tools)
        return self.send(request, timeout, trace)

    def send(
        self,
        request: Request,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        trace: TraceContext = TraceContext(),  # noqa: B008  # frozen
    ) -> CompletionStream:
        """Send a request and return the stream of its completion.

        Args:
            request: what `generate` builds from its arguments.
            timeout: seconds until the whole request ends with DeadlineExceededError; infinity is none.
            trace: the trace that the request is part of; both services log its id.

        Returns:
            The stream of tokens.

        Raises:
            InvalidArgumentError: the timeout is not a number above 0.
            FailedPreconditionError: the client is closed.
        """
        seconds = grpc_timeout(timeout)
        message = request.to_proto()
        received = ReceivedAnswer(timeout, self.address)

        def begin(left: float | None) -> Any:
            with self._while_open():
                return self._prefill.Generate(message, timeout=left, metadata=trace.metadata)

        return CompletionStream(RepeatedStream(begin, seconds, self._several), received)

    def server_info(self, timeout: float = INFO_TIMEOUT_SECONDS) -> ServerInfo:
        """Return what a prefill or decode service says of itself: which model it serves, and how.

        Args:
            timeout: seconds until each of at most two calls is given up.

        Raises:
            NotFoundError: the server is neither a prefill nor a decode service.
            SpectrumKVError: the server cannot be reached.
        """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
        prefill_info: prefill_pb2.PrefillServiceGetServerInfoResponse
        decode_info: decode_pb2.DecodeServiceGetServerInfoResponse
        seconds = grpc_timeout(timeout)
        try:
            request = prefill_pb2.PrefillServiceGetServerInfoRequest()
            with self._while_open():
                prefill_info = repeated(
                    lambda left: self._prefill.GetServerInfo(request, timeout=left), seconds, self._several
                )
            return prefill_info
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise error_from_rpc(error) from error
        try:
            decode_request = decode_pb2.DecodeServiceGetServerInfoRequest()
            with self._while_open():
                decode_info = repeated(
                    lambda left: self._decode.GetServerInfo(decode_request, timeout=left), seconds, self._several
                )
            return decode_info
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise NotFoundError(
                    f"{self.address} is neither a prefill nor a decode service of SpectrumKV"
                ) from error
            raise error_from_rpc(error) from error

    def is_serving(self, timeout: float = INFO_TIMEOUT_SECONDS) -> bool:
        """Return whether the server's standard health check says SERVING.

        Raises:
            SpectrumKVError: the server cannot be reached or has no health service.
        """
        with self._while_open():
            return readiness.is_serving(self._channel, grpc_timeout(timeout))

    def wait_until_serving(self, timeout: float) -> None:
        """Wait until the server's standard health service says SERVING, through its `Watch` stream.

        Raises:
            DeadlineExceededError: the server was not ready within `timeout` seconds.
            CancelledError: the client was closed during the wait.
        """
        readiness.wait_until_serving(self._channel, self.address, grpc_timeout(timeout))

    @contextmanager
    def _while_open(self) -> Iterator[None]:
        """Turn the ValueError that gRPC raises for a call on a closed channel into FailedPreconditionError.

        Raises:
            FailedPreconditionError: this client is closed.
            ValueError: the block raised it for another reason.
        """
        try:
            yield
        except ValueError as error:
            if not self._closed:
                raise
            raise FailedPreconditionError(
                f"this client of {self.address} is closed; make another SpectrumClient"
            ) from error
