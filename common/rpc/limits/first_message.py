"""Calls that have been opened and say nothing: how many there may be, and how long each may wait.

gRPC's server gives a call a thread as soon as its headers are there. A caller that sends headers and no message, or a
part of one, would hold that thread for as long as its connection stands: no handler runs yet, and no deadline counts.
So every call waits for its first message here, whichever its method, and takes a place among the requests only then.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import grpc

from spectrumkv.common.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
)
from spectrumkv.common.rpc.status import end_call, to_status

FIRST_MESSAGE_SECONDS = 10.0
RETRY_AFTER_SECONDS = 1.0
# An honest caller's message follows its headers at once, but a busy server may not have read it yet. A call that has
# said nothing for longer than that is silent; whoever opens many calls at once has its message read in that time.
GRACE_SECONDS = 1.0

# What gRPC says where a handler's request cannot be parsed.
_UNPARSED = "Exception deserializing request!"

Behaviour = Callable[[Any, grpc.ServicerContext], Any]
# Called for each call that ends before its first message came, with the reason.
CountSilent = Callable[[str], None]


@dataclass(eq=False)
class _SilentCall:
    context: grpc.ServicerContext
    peer: str
    since: float
    # Why this server ended it; None while it has not.
    error: SpectrumKVError | None = None


class SilentCalls:
    """The calls of a server whose first message has not come yet.

    One connection may have half of the places. One more call of it waits a moment for the messages of the others,
    which may be on their way, and is then refused. Where all places are taken, a call that has been silent for longer
    than that moment is ended, the oldest first; where there is none, the oldest of the connection that has the most:
    an honest caller whose message is not read yet gives way to nobody who opens one silent call after another.

    Args:
        limit: how many there may be; each holds a thread.
        hesitating: how many may wait for a place of their connection; each holds a thread, too.
        seconds: how long each may wait.
        count: called with "connection", "all" or "time" where a call ends for having too many beside it on its
            connection or in all, or for its silence.
        most_bytes: of a message, in a call of one request; a longer one is refused. None leaves it at gRPC's limit.
    """

    def __init__(
        self, limit: int, hesitating: int, seconds: float, count: CountSilent, most_bytes: int | None = None
    ) -> None:
        self._limit = limit
        self._most_bytes = most_bytes
        self._of_one_connection = max(1, limit // 2)
        self._most_hesitating = hesitating
        self._hesitating = 0
        self._seconds = seconds
        self._count = count
        self._changed = threading.Condition()
        # In the order of their coming, which is that of the ends of their time.
        self._waiting: OrderedDict[_SilentCall, None] = OrderedDict()
        self._of_peer: Counter[str] = Counter()
        self._clock: threading.Thread | None = None

    def unary(self, behaviour: Behaviour, deserialize: Callable[[bytes], Any]) -> Behaviour:
        """Make a handler of one request into one of a stream of bytes; what is on the wire stays the same.

        Args:
            behaviour: takes a message and the context, and returns the answer or an iterator over the answers.
            deserialize: makes the message.

        Returns:
            What takes an iterator over messages as bytes and the context, and returns what `behaviour` does.
        """

        def called(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            data = self._first_or_abort(requests, context)
            if data is None:
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, "the call has no request message; it takes exactly one"
                )
            if self._most_bytes is not None and len(data) > self._most_bytes:
                error = InvalidArgumentError(
                    f"the request has {len(data)} bytes; allowed for this method: at most {self._most_bytes}"
                )
                context.abort_with_status(to_status(error))
            try:
                message = deserialize(data)
            except Exception:  # noqa: BLE001  # what a parser raises is its own affair, and the caller's fault
                context.abort(grpc.StatusCode.INTERNAL, _UNPARSED)
            return behaviour(message, context)

        return called

    def stream(self, behaviour: Behaviour) -> Behaviour:
        """Let a handler of a stream of requests run once the first of them is there, or none follows.

        Args:
            behaviour: takes an iterator over messages and the context.

        Returns:
            The same.
        """

        def called(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            message = self._first_or_abort(requests, context)
            return behaviour(iter(()) if message is None else chain((message,), requests), context)

        return called

    def _first_or_abort(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """Return a call's first message, or None where the caller sends none; end the call where none comes."""
        try:
            with self._held(context) as call:
                message = _next_or_none(requests, call)
        except ResourceExhaustedError as error:
            context.abort_with_status(to_status(error))
        # A call that this server cancels looks to its handler as if the messages had ended.
        if call.error is not None:
            context.abort_with_status(to_status(call.error))
        return message

    @contextmanager
    def _held(self, context: grpc.ServicerContext) -> Iterator[_SilentCall]:
        call = self._enter(context)
        try:
            yield call
        finally:
            with self._changed:
                if call in self._waiting:
                    self._forget(call)

    def _enter(self, context: grpc.ServicerContext) -> _SilentCall:
        peer = context.peer()
        with self._changed:
            if not self._comes_in(peer):
                self._count("connection")
                raise ResourceExhaustedError(
                    f"{self._of_one_connection} calls of this connection have sent headers and no message, as many "
                    "as this server lets wait; send each call's message with its headers",
                    RETRY_AFTER_SECONDS,
                )
            self._of_peer[peer] += 1
            if len(self._waiting) >= self._limit:
                sentence = (
                    "too many calls have sent headers and no message; send each call's message with its headers"
                )
                self._end(self._least_honest(), "all", ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))
            call = _SilentCall(context, peer, time.monotonic())
            self._waiting[call] = None
            if self._clock is None:
                self._clock = threading.Thread(target=self._watch, name="first-message", daemon=True)
                self._clock.start()
        return call

    def _comes_in(self, peer: str) -> bool:
        """Return whether a connection has a place, waiting a moment where its calls may be about to speak."""
        if self._of_peer[peer] < self._of_one_connection:
            return True
        if self._hesitating >= self._most_hesitating:
            return False
        self._hesitating += 1
        try:
            return self._changed.wait_for(lambda: self._of_peer[peer] < self._of_one_connection, GRACE_SECONDS)
        finally:
            self._hesitating -= 1

    def _least_honest(self) -> _SilentCall:
        """Return the call that gives way to one that is counted with its connection, and does not wait yet."""
        oldest = next(iter(self._waiting))
        if time.monotonic() - oldest.since > GRACE_SECONDS:
            return oldest
        [(most, _)] = self._of_peer.most_common(1)
        return next(call for call in self._waiting if call.peer == most)

    def _forget(self, call: _SilentCall) -> None:
        del self._waiting[call]
        self._of_peer[call.peer] -= 1
        if not self._of_peer[call.peer]:
            del self._of_peer[call.peer]
        if self._hesitating:
            self._changed.notify_all()

    def _watch(self) -> None:
        """End the calls whose time is up; the thread ends when none waits."""
        sentence = (
            f"the call's first message did not come within {self._seconds:g} s of its headers; send it with them"
        )
        with self._changed:
            while self._waiting:
                oldest = next(iter(self._waiting))
                left = oldest.since + self._seconds - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._end(oldest, "time", DeadlineExceededError(sentence))
            self._clock = None

    def _end(self, call: _SilentCall, reason: str, error: SpectrumKVError) -> None:
        self._forget(call)
        self._count(reason)
        call.error = error
        end_call(call.context, error)


def _next_or_none(requests: Iterator[Any], call: _SilentCall) -> Any:
    try:
        return next(requests, None)
    except grpc.RpcError:
        # Either this server has ended the call, or its caller went away.
        if call.error is None:
            raise
        return None
