"""Keeps coded KV until consumers have fetched it, in bounded memory and for a bounded time."""

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from spectrumkv.common.errors import NotFoundError, ResourceExhaustedError, SpectrumKVError
from spectrumkv.vllm_plugin.prefill.transfer import Transfer

# Ids of transfers that are over are remembered, so that a second fetch is refused at once and does not wait.
REMEMBERED = 4096
RETRY_SECONDS = 1.0
# Most fetches that may wait for a transfer to begin: each holds a thread, which others need for what is there.
MOST_EARLY = 64


class Outbox:
    """Holds transfers by their id.

    Args:
        memory_bytes: what coded KV, and KV that waits to be coded, may take.
        time_to_live: seconds after its last change that a transfer is kept.
        on_expired: called for each transfer that nobody fetched in time.
        clock: of monotonic seconds.
    """

    def __init__(
        self,
        memory_bytes: int,
        time_to_live: float,
        on_expired: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory_bytes, self._time_to_live = memory_bytes, time_to_live
        self._on_expired, self._clock = on_expired, clock
        self._changed = threading.Condition()
        self._transfers: dict[str, Transfer] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self._used_bytes = self._early = 0

    @property
    def used_bytes(self) -> int:
        """Return the memory that is reserved."""
        return self._used_bytes

    def open(self, transfer_id: str, reserve_bytes: int, fetches: int) -> None:
        """Begin a transfer, in place of one of the same id that was begun before.

        Args:
            transfer_id: names it.
            reserve_bytes: what it may take, with what waits to be coded.
            fetches: how many requests will fetch it.

        Raises:
            ResourceExhaustedError: the outbox has not so much memory left.
        """
        with self._changed:
            self._expire()
            self._drop(transfer_id, over=False)
            self._over.pop(transfer_id, None)
            transfer = Transfer(reserve_bytes, fetches, self._clock() + self._time_to_live)
            self._transfers[transfer_id] = transfer
            if self._used_bytes + reserve_bytes > self._memory_bytes:
                transfer.reserved_bytes = 0
                transfer.failure = ResourceExhaustedError(
                    f"the outbox has {self._memory_bytes - self._used_bytes} of {self._memory_bytes} bytes left, and "
                    f"this prompt's KV takes {reserve_bytes}; raise outbox_memory, or fetch sooner",
                    RETRY_SECONDS,
                )
                self._changed.notify_all()
                raise transfer.failure
            self._used_bytes += reserve_bytes
            self._changed.notify_all()

    def holds(self, transfer_id: str) -> bool:
        """Tell whether a transfer is still wanted, which may change at any time.

        Args:
            transfer_id: names it.

        Returns:
            Whether its messages are kept.
        """
        with self._changed:
            found = self._transfers.get(transfer_id)
            return found is not None and found.failure is None

    def add(self, transfer_id: str, message: bytes) -> None:
        """Append a message; one for a transfer that is over is dropped."""
        with self._changed:
            if (found := self._transfers.get(transfer_id)) is not None:
                found.messages.append(message)
                self._changed.notify_all()

    def finish(self, transfer_id: str, end: bytes) -> None:
        """Append the last message, and keep no more memory reserved than the messages take."""
        with self._changed:
            if (found := self._transfers.get(transfer_id)) is None:
                return
            found.messages.append(end)
            found.complete = True
            taken = sum(map(len, found.messages))
            self._used_bytes += taken - found.reserved_bytes
            found.reserved_bytes = taken
            found.expires_at = self._clock() + self._time_to_live
            self._changed.notify_all()

    def fail(self, transfer_id: str, failure: SpectrumKVError) -> None:
        """Tell whoever fetches a transfer why there is none."""
        with self._changed:
            if (found := self._transfers.get(transfer_id)) is None:
                return
            self._used_bytes -= found.reserved_bytes
            found.reserved_bytes, found.failure = 0, failure
            found.messages.clear()
            self._changed.notify_all()

    def release(self, transfer_id: str, request_id: str) -> None:
        """Take in that a request will not fetch a transfer; a second call does nothing."""
        with self._changed:
            if (found := self._transfers.get(transfer_id)) is not None:
                found.given_up_by.add(request_id)
                self._drop_if_over(transfer_id, found)

    def discard(self, transfer_id: str) -> None:
        """Drop a transfer that nobody will fetch."""
        with self._changed:
            self._drop(transfer_id, over=True)

    def expire(self) -> None:
        """Drop the transfers whose time is over."""
        with self._changed:
            self._expire()

    def fetch(
        self, transfer_id: str, request_id: str, rank: int, consumers: int, ended: Callable[[], bool], seconds: float
    ) -> Iterator[bytes]:
        """Hand out a transfer's messages as they come, and take in that they were fetched.

        Args:
            transfer_id: names it; it may be still to come.
            request_id: that will generate from it.
            rank: of the consumer.
            consumers: how many ranks fetch this stream for one request.
            ended: whether the caller has gone.
            seconds: how long to wait for the next message.

        Yields:
            The messages.

        Raises:
            NotFoundError: it is over, or did not come in time.
            SpectrumKVError: it could not be coded.
        """
        found = self._begin(transfer_id, request_id, consumers, rank, ended, seconds)
        try:
            for number in itertools.count():
                message, is_last = self._message(transfer_id, found, number, ended, seconds)
                yield message
                if is_last:
                    break
            with self._changed:
                found.fetched_by.setdefault(request_id, set()).add(rank)
        finally:
            with self._changed:
                found.readers -= 1
                found.expires_at = self._clock() + self._time_to_live
                self._drop_if_over(transfer_id, found)

    def wake(self) -> None:
        """Let those who wait look whether their callers are still there."""
        with self._changed:
            self._changed.notify_all()

    def _message(
        self, transfer_id: str, found: Transfer, number: int, ended: Callable[[], bool], seconds: float
    ) -> tuple[bytes, bool]:
        """Wait for a message.

        Returns:
            The message, and whether it is the last one.

        Raises:
            NotFoundError: the transfer was given up, or the message did not come in time.
        """

        def is_there() -> bool:
            return found.failure is not None or len(found.messages) > number or self._gone(transfer_id, found)

        with self._changed:
            self._wait(is_there, ended, seconds)
            if found.failure is not None:
                raise found.failure
            if self._gone(transfer_id, found) or len(found.messages) <= number:
                raise NotFoundError(f"transfer {transfer_id!r} was given up while it was fetched")
            return found.messages[number], found.complete and number == len(found.messages) - 1

    def _begin(
        self, transfer_id: str, request_id: str, consumers: int, rank: int, ended: Callable[[], bool], seconds: float
    ) -> Transfer:
        with self._changed:
            self._expire()
            self._wait_until_begun(transfer_id, ended, seconds)
            found = self._transfers.get(transfer_id)
            if found is None or not found.may_be_fetched(request_id, rank):
                known = found is not None or transfer_id in self._over
                raise NotFoundError(
                    f"transfer {transfer_id!r} was fetched, given up or dropped before"
                    if known
                    else f"transfer {transfer_id!r} did not begin within {seconds:g} s"
                )
            found.consumers = consumers
            found.readers += 1
            return found

    def _wait_until_begun(self, transfer_id: str, ended: Callable[[], bool], seconds: float) -> None:
        """Wait for a transfer that may be still to come.

        Raises:
            ResourceExhaustedError: many fetches wait like this.
        """
        if transfer_id in self._transfers or transfer_id in self._over:
            return
        if self._early >= MOST_EARLY:
            raise ResourceExhaustedError(
                f"{self._early} fetches wait for transfers that have not begun; fetch once prefill has answered",
                RETRY_SECONDS,
            )
        self._early += 1
        try:
            self._wait(lambda: transfer_id in self._transfers or transfer_id in self._over, ended, seconds)
        finally:
            self._early -= 1

    def _wait(self, condition: Callable[[], object], ended: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition, but not for a caller who has gone: its end notifies (see `wake`)."""
        self._changed.wait_for(lambda: condition() or ended(), seconds)

    def _gone(self, transfer_id: str, found: Transfer) -> bool:
        return self._transfers.get(transfer_id) is not found

    def _drop_if_over(self, transfer_id: str, found: Transfer) -> None:
        if found.is_over and not found.readers and not self._gone(transfer_id, found):
            self._drop(transfer_id, over=True)

    def _drop(self, transfer_id: str, over: bool) -> None:
        found = self._transfers.pop(transfer_id, None)
        if found is not None:
            self._used_bytes -= found.reserved_bytes
        if over:
            self._over[transfer_id] = None
            while len(self._over) > REMEMBERED:
                self._over.popitem(last=False)
        self._changed.notify_all()

    def _expire(self) -> None:
        now = self._clock()
        for transfer_id in [
            one for one, found in self._transfers.items() if found.expires_at <= now and not found.readers
        ]:
            self._drop(transfer_id, over=True)
            self._on_expired()
