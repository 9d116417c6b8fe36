"""Iterate over what a server answers to one request."""

from types import TracebackType
from typing import Any

import grpc

from spectrumkv.client.completion import Completion, PromptToken, TokenEvent
from spectrumkv.client.received import ReceivedAnswer


class CompletionStream:
    """Iterate over the tokens of one request as they arrive; `result` returns the whole completion.

    Args:
        call: the running RPC.
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
