"""Check what arrives of an answer and keep it; the stream of either client reads its responses through this."""

import time
from collections import Counter

import grpc

from spectrumkv.client.completion import Completion, Finished, PromptToken, TokenEvent
from spectrumkv.common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    SpectrumKVError,
)
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.v1 import prefill_pb2


class ReceivedAnswer:
    """Hold what has arrived of the answer to one request.

    Args:
        timeout: the deadline of the call in seconds, which error messages name.
        address: the server, which error messages name.

    Attributes:
        prompt_tokens: the prompt's, where the request asked for them; complete once the first token has arrived.
    """

    def __init__(self, timeout: float, address: str) -> None:
        self._sent = time.perf_counter()
        self._timeout = timeout
        self._address = address
        self.prompt_tokens: tuple[PromptToken, ...] = ()
        self._tokens: list[TokenEvent] = []
        self._lengths: Counter[int] = Counter()
        self._finished: Finished | None = None

    def accept(self, response: prefill_pb2.GenerateResponse) -> TokenEvent | None:
        """Take the next response.

        Args:
            response: as the server sent it.

        Returns:
            The token; None if the response is a part of the prompt or the result. The completion is good only if
            the RPC then ends with status OK.

        Raises:
            InternalError: the response breaks the protocol.
        """
        arrived = time.perf_counter() - self._sent
        if self._finished is not None:
            raise InternalError("the server sent more after the result")
        kind = response.WhichOneof("message")
        if kind == "token":
            return self._accept(TokenEvent.from_proto(response.token, arrived))
        if kind == "prompt_tokens":
            self.prompt_tokens += tuple(map(PromptToken.from_proto, response.prompt_tokens.tokens))
        else:
            self._finished = Finished.from_proto(response.finished, arrived)
        return None

    def check_ended(self) -> None:
        """Check that the answer is whole, after its RPC ended with status OK.

        Raises:
            InternalError: the result has not come.
        """
        if self._finished is None:
            raise InternalError(f"the server ended the stream after {len(self._tokens)} tokens without a result")

    def completion(self) -> Completion:
        """Return the whole answer.

        Raises:
            InternalError: the result has not come.
        """
        if self._finished is None:
            raise InternalError("the completion has no result")
        return Completion(tuple(self._tokens), self._finished, self.prompt_tokens)

    def error_of(self, error: grpc.RpcError) -> SpectrumKVError:
        """Return what the status of the RPC means to the caller."""
        # Sooner, it is a limit of the server's, whose own sentence says so.
        own = time.perf_counter() - self._sent > 0.98 * self._timeout - 0.1
        if own and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceededError(
                f"no complete answer within {self._timeout:g} s ({len(self._tokens)} tokens had come); "
                "allow more time or ask for fewer tokens"
            )
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            # A prefill service of this release implements the method, and never forwards this status of a worker.
            return FailedPreconditionError(
                f"{self._address} is no prefill service of this release, perhaps a decode service or another "
                f"program ({error.details()}); name the prefill service"
            )
        return error_from_rpc(error)

    def _accept(self, token: TokenEvent) -> TokenEvent:
        due = self._lengths[token.answer]
        if token.index != due:
            raise InternalError(f"token {token.index} of answer {token.answer} arrived where token {due} was due")
        self._lengths[token.answer] += 1
        self._tokens.append(token)
        return token
