"""Iterate over what a server answers to one request."""

import time
from collections import Counter
from types import TracebackType
from typing import Any

import grpc

from spectrumkv.client.completion import Completion, Finished, PromptToken, TokenEvent
from spectrumkv.common.errors import DeadlineExceededError, FailedPreconditionError, InternalError
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.v1 import prefill_pb2


class CompletionStream:
    """Iterate over the tokens of one request as they arrive; `result` returns the whole completion.

    Args:
        call: the running RPC.
        sent: when the request was sent, by `time.perf_counter`.
        timeout: the deadline of the call in seconds, which error messages name.
        address: the server, which error messages name.

    Attributes:
        prompt_tokens: the prompt's, where the request asked for them; complete once the first token has arrived.
    """

    def __init__(self, call: Any, sent: float, timeout: float, address: str) -> None:
        self._call = call
        self._sent = sent
        self._timeout = timeout
        self._address = address
        self.prompt_tokens: tuple[PromptToken, ...] = ()
        self._tokens: list[TokenEvent] = []
        self._lengths: Counter[int] = Counter()
        self._finished: Finished | None = None

    def __iter__(self) -> "CompletionStream":
        return self

    def __next__(self) -> TokenEvent:
        """Return the next token, after waiting for it.

        Raises:
            SpectrumKVError: the server ended the request with an error (the class corresponds to the status), or
                its answer breaks the protocol.
            InternalError: the server sent more after the end of the answer.
        """
        while True:
            response = self._receive()
            arrived = time.perf_counter() - self._sent
            if self._finished is not None:
                raise InternalError("the server sent more after the result")
            kind = response.WhichOneof("message")
            if kind == "token":
                return self._accept(TokenEvent.from_proto(response.token, arrived))
            if kind == "prompt_tokens":
                self.prompt_tokens += tuple(map(PromptToken.from_proto, response.prompt_tokens.tokens))
                continue
            # The completion is good only if the RPC then ends with status OK.
            self._finished = Finished.from_proto(response.finished, arrived)

    def result(self) -> Completion:
        """Return the whole completion, after waiting for the remaining tokens.

        Raises:
            SpectrumKVError: see `__next__`.
            InternalError: the stream was read before, and ended without a result.
        """
        for _ in self:
            pass
        if self._finished is None:
            raise InternalError("the completion has no result")
        return Completion(tuple(self._tokens), self._finished, self.prompt_tokens)

    def cancel(self) -> None:
        """Cancel the request, so that both services free its memory. A request that has ended is left as it is."""
        self._call.cancel()

    def __enter__(self) -> "CompletionStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _receive(self) -> prefill_pb2.GenerateResponse:
        response: prefill_pb2.GenerateResponse
        try:
            response = next(self._call)
            return response
        except StopIteration:
            if self._finished is None:
                raise InternalError(
                    f"the server ended the stream after {len(self._tokens)} tokens without a result"
                ) from None
            raise
        except grpc.RpcError as error:
            # Sooner, it is a limit of the server's, whose own sentence says so.
            own = time.perf_counter() - self._sent > 0.98 * self._timeout - 0.1
            if own and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceededError(
                    f"no complete answer within {self._timeout:g} s ({len(self._tokens)} tokens had come); "
                    "allow more time or ask for fewer tokens"
                ) from error
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                # A prefill service of this release implements the method, and never forwards this status of a worker.
                raise FailedPreconditionError(
                    f"{self._address} is no prefill service of this release, perhaps a decode service or another "
                    f"program ({error.details()}); name the prefill service"
                ) from error
            raise error_from_rpc(error) from error

    def _accept(self, token: TokenEvent) -> TokenEvent:
        due = self._lengths[token.answer]
        if token.index != due:
            raise InternalError(f"token {token.index} of answer {token.answer} arrived where token {due} was due")
        self._lengths[token.answer] += 1
        self._tokens.append(token)
        return token
