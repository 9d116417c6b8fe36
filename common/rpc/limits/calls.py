"""How many calls of each kind a server has at once, and what one more is told."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from spectrumkv.common.errors import (
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
    UnimplementedError,
)
from spectrumkv.common.rpc.limits.first_message import RETRY_AFTER_SECONDS, SilentCalls
from spectrumkv.common.rpc.limits.stalled_readers import StalledReaders


class StreamLimit:
    """Counts the streams that are open, and refuses more than a limit.

    Args:
        limit: how many may be open.
        refusal: makes the error for one more.
    """

    def __init__(self, limit: int, refusal: Callable[[], SpectrumKVError]) -> None:
        self._limit = limit
        self._refusal = refusal
        self._lock = threading.Lock()
        self._handlers = 0
        # Each stream counts twice here: for its handler, and for its RPC, which ends only when the caller has the
        # status.
        self._unfinished = 0
        self._when_none_left: Callable[[], None] | None = None
        self._closed = False

    @contextmanager
    def hold(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a stream as open while its handler runs.

        Args:
            context: of the stream.

        Raises:
            UnavailableError: the server is shutting down.
            SpectrumKVError: as many streams as the limit allows are open.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("this server is shutting down; try another one", RETRY_AFTER_SECONDS)
            if self._handlers >= self._limit:
                raise self._refusal()
            self._handlers += 1
            self._unfinished += 2
        if not context.add_callback(self._finish_one):
            self._finish_one()
        try:
            yield
        finally:
            with self._lock:
                self._handlers -= 1
            self._finish_one()

    def close(self) -> None:
        """Refuse every further stream."""
        with self._lock:
            self._closed = True

    def when_none_left(self, callback: Callable[[], None]) -> None:
        """Call `callback` when no stream is open: at once, or at the end of the last one."""
        with self._lock:
            if self._unfinished:
                self._when_none_left = callback
                return
        callback()

    def _finish_one(self) -> None:
        with self._lock:
            self._unfinished -= 1
            if self._unfinished or self._when_none_left is None:
                return
            callback, self._when_none_left = self._when_none_left, None
        callback()


def request_limit(limit: int) -> StreamLimit:
    """Return the limit of requests; one more is refused with RESOURCE_EXHAUSTED and told when to try again."""
    sentence = (
        f"{limit} requests are in this server, as many as --max-waiting (prefill) or --max-streams (decode) allows; "
        "try again later"
    )
    return StreamLimit(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


def watch_limit(limit: int) -> StreamLimit:
    """Return the limit of streams of health and reflection; one more is refused with UNIMPLEMENTED.

    A gRPC client that watches health goes on without it where the status is UNIMPLEMENTED; any other status tells it
    that the server is unhealthy (github.com/grpc/proposal, A17).
    """
    sentence = f"{limit} streams watch this server already, which is the most that it serves"
    return StreamLimit(limit, lambda: UnimplementedError(sentence))


def upload_limit(limit: int) -> StreamLimit:
    """Return the limit of calls that send a stream and get one answer; one more is refused like a request."""
    sentence = f"{limit} uploads are under way to this server, as many as it serves; try again later"
    return StreamLimit(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


def question_limit(limit: int) -> StreamLimit:
    """Return the limit of calls that tokenize or detokenize; one more is refused like a request."""
    sentence = f"{limit} texts are being tokenized by this server, as many as it does at once; try again later"
    return StreamLimit(limit, lambda: ResourceExhaustedError(sentence, RETRY_AFTER_SECONDS))


@dataclass(frozen=True)
class CallLimits:
    """How many calls of each kind a server has at once.

    Attributes:
        requests: limits the streams of SpectrumKV's own services.
        uploads: limits calls that send a stream and get one answer.
        questions: limits calls that send one message and get one answer, other than GetServerInfo.
        watchers: limits all other streams, which are those of health and reflection.
        silent: the calls of SpectrumKV's own services that have not sent a message yet.
        silent_watchers: those of health and reflection.
        readers: ends streams whose callers take no message.
        watcher_threads: what calls of health and reflection run on, so that nothing else can take their threads.
    """

    requests: StreamLimit
    uploads: StreamLimit
    questions: StreamLimit
    watchers: StreamLimit
    silent: SilentCalls
    silent_watchers: SilentCalls
    readers: StalledReaders
    watcher_threads: ThreadPoolExecutor
