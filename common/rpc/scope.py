"""Tells a handler when and why its RPC is over."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import grpc

from spectrumkv.common.errors import CancelledError, DeadlineExceededError, SpectrumKVError
from spectrumkv.common.rpc.status import DEADLINE_MESSAGE, end_call

# For a caller that set no deadline, gRPC's synchronous server reports one that is centuries away.
NO_DEADLINE_SECONDS = 10 * 365 * 86400.0
# How long a handler may take to notice that a deadline of the server's own passed; then its RPC is cancelled.
NOTICE_SECONDS = 1.0


@contextmanager
def cancelled_after(seconds: float, cancel: Callable[[], object]) -> Iterator[None]:
    """Call `cancel`, on a thread of its own, if the block takes longer than `seconds`."""
    clock = threading.Timer(seconds, cancel)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()


def deadline_seconds(context: grpc.ServicerContext) -> float | None:
    """Return the seconds that are left until the caller's deadline, or None where it set none."""
    remaining = context.time_remaining()
    return None if remaining is None or remaining > NO_DEADLINE_SECONDS else float(remaining)


class RpcEnd:
    """Records why an RPC ended before its handler did.

    A deadline arrives as a cancel: gRPC rounds timeouts up to three digits for the wire, so that the caller's
    deadline passes before the server's. A cancel this close to the deadline is therefore taken for the deadline.

    Args:
        context: the handler's gRPC context.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        given = deadline_seconds(context)
        self._slack = 0.05 + 0.01 * (given or 0.0)
        # gRPC tells the time that is left by the system's clock, which somebody may set meanwhile.
        self._deadline = None if given is None else time.monotonic() + given
        self._recorded: SpectrumKVError | None = None
        if not context.add_callback(self._record):
            self._record()

    @property
    def error(self) -> SpectrumKVError:
        """The DeadlineExceededError or CancelledError; to be read only once the RPC is over."""
        # gRPC may wake the handler before it calls `_record`.
        return self._recorded or self._reason()

    def _record(self) -> None:
        self._recorded = self._reason()

    def _reason(self) -> SpectrumKVError:
        near = self._deadline is not None and self._deadline - time.monotonic() <= self._slack
        # `RpcScope` sets this code before it cancels an RPC for a deadline of the server's own.
        late = self._context.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if late or near:
            return DeadlineExceededError(DEADLINE_MESSAGE)
        return CancelledError("the caller cancelled the request")


class RpcScope:
    """Tells a handler whether its caller still waits, and for how long.

    Args:
        context: the handler's gRPC context.
        default_seconds: the deadline of a caller that set none.
        longest_seconds: the deadline of a caller that set a later one.
    """

    def __init__(
        self, context: grpc.ServicerContext, default_seconds: float, longest_seconds: float = math.inf
    ) -> None:
        self._context = context
        self._end_reason = RpcEnd(context)
        self._lock = threading.Lock()
        self._on_end: list[Callable[[], object]] = []
        self._ended = threading.Event()
        self._expired = False
        self._left = False
        self._timer: threading.Timer | None = None
        given = deadline_seconds(context)
        too_late = given is not None and given > longest_seconds
        seconds = min(default_seconds if given is None else given, longest_seconds)
        self._deadline = time.monotonic() + seconds
        self._late_message = (
            f"the request took {longest_seconds:g} s, the longest that this server allows (--max-deadline)"
            if too_late
            else DEADLINE_MESSAGE
        )
        if not context.add_callback(self._end):
            self._ended.set()
        elif given is None or too_late:
            self._start_clock(seconds, self._expire)

    @property
    def seconds_remaining(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def ended(self) -> bool:
        """Whether the caller went away or the deadline passed."""
        return self._ended.is_set() or self.seconds_remaining == 0 or not self._context.is_active()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, as soon as the RPC is over for whatever reason: at once if it already is.

        Args:
            callback: must not block: it may run in a thread that all RPCs of the server need.
        """
        with self._lock:
            if not self._ended.is_set():
                self._on_end.append(callback)
                return
        callback()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cancel the RPC with DEADLINE_EXCEEDED if the block takes longer than `seconds`."""
        sentence = f"the call took {seconds:g} s, the longest that this server allows"
        with cancelled_after(seconds, lambda: self._cancel(sentence)):
            yield

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the RPC is over, but for no longer than `seconds`."""
        self._ended.wait(seconds)

    def check(self) -> None:
        """Raise the error that says why the RPC is over, if it is over.

        Raises:
            DeadlineExceededError: the deadline passed.
            CancelledError: the caller went away.
        """
        if self._expired or (self.seconds_remaining == 0 and not self._ended.is_set()):
            raise DeadlineExceededError(self._late_message)
        if self.ended:
            raise self._end_reason.error

    def __enter__(self) -> "RpcScope":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_clock()

    def _start_clock(self, seconds: float, then: Callable[[], None]) -> None:
        with self._lock:
            if self._left:
                return
            self._timer = threading.Timer(seconds, then)
            self._timer.daemon = True
            self._timer.start()

    def _stop_clock(self) -> None:
        with self._lock:
            self._left = True
            if self._timer is not None:
                self._timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        # A handler that waits for its caller to read or to send notices nothing but a cancel.
        self._start_clock(NOTICE_SECONDS, lambda: self._cancel(self._late_message))
        self._call_back()

    def _cancel(self, sentence: str) -> None:
        self._context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
        end_call(self._context, DeadlineExceededError(sentence))

    def _end(self) -> None:
        self._stop_clock()
        self._call_back()

    def _call_back(self) -> None:
        with self._lock:
            self._ended.set()
            callbacks, self._on_end = self._on_end, []
        with ExitStack() as all_of_them:
            for callback in reversed(callbacks):
                all_of_them.callback(callback)
