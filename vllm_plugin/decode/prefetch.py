"""Receives transfers before their requests come: while prefill computes, and while a proxy's request is on its way.

A proxy announces a transfer by a small request (see `scheduler.params`). What arrives is kept as it came, coded,
until the fetch of the request that decodes over it takes it over.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from spectrumkv.common.errors import CancelledError, DeadlineExceededError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.rpc.transfer_methods import ArrivedMessage
from spectrumkv.vllm_plugin.scheduler.steps import TransferRef


@dataclass
class PrefetchMemory:
    """The bytes of all prefetches of a worker.

    Attributes:
        most_bytes: that they may hold. One message more is taken for each prefetch that was taken over.
        used_bytes: that they hold.
        changed: guards this and every prefetch, and tells of each change.
    """

    most_bytes: int
    used_bytes: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)


@dataclass
class _Stream:
    """What one rank of the producer sent, as far as it has come and was not read."""

    messages: deque[ArrivedMessage] = field(default_factory=deque)
    ended: bool = False
    failure: grpc.RpcError | None = None


class Prefetch:
    """One transfer, received on the thread that calls `run`.

    It is open at first. `take` takes it over for a fetch, which then reads its streams; `cancel`, a failure and
    patience without a fetch end it. An ended one holds no memory.

    Args:
        transfer: as its announcement names it.
        ranks: of the producer whose streams are needed, in the order in which they are read.
        memory: of all prefetches.
        patience: seconds to wait for the first message, and afterwards for the fetch.
    """

    def __init__(self, transfer: TransferRef, ranks: Sequence[int], memory: PrefetchMemory, patience: float) -> None:
        self.transfer = transfer
        self._streams = {rank: _Stream() for rank in ranks}
        self._memory, self._patience = memory, patience
        self._call: Any = None
        self._begun_at: float | None = None
        self._complete = self._taken = self._over = False

    def run(self, begin: Callable[[int, float], Any]) -> None:
        """Receive all streams, and return once a fetch took them over.

        Args:
            begin: calls a rank of the producer, for at most some seconds, and returns the call.

        Raises:
            DeadlineExceededError: no fetch took the transfer over in time.
            SpectrumKVError: the transfer did not come, or was cancelled.
        """
        changed = self._memory.changed
        try:
            for rank, stream in self._streams.items():
                # A fetch may take over until the patience is over, and then has as long as it would have for itself.
                self._receive(partial(begin, rank, 2 * self._patience), stream)
            with changed:
                self._complete = True
                changed.wait_for(lambda: self._taken or self._over, self._patience)
                # A fetch that took all of it ends this prefetch, maybe before this thread has got here.
                if not self._taken:
                    self._check()
                    raise DeadlineExceededError(f"no request came for the KV within {self._patience:g} s")
        except grpc.RpcError as error:
            with changed:
                if not self._taken:
                    self._check()
                    failure = error_from_rpc(error)
                    raise failure from None
        finally:
            with changed:
                if not self._taken:
                    self._end()

    def take(self) -> bool:
        """Take the transfer over, if it is not too late to rely on it.

        Returns:
            Whether `stream` may be read; if not, this prefetch has ended, and who asks fetches for itself.
        """
        with self._memory.changed:
            is_young = self._begun_at is not None and time.monotonic() - self._begun_at < self._patience
            if not self._over and (self._complete or is_young):
                self._taken = True
                self._memory.changed.notify_all()
                return True
        self.cancel()
        return False

    def stream(self, rank: int) -> "TakenStream":
        """Return what a rank of the producer sent; only whoever took the transfer over may read it."""
        return TakenStream(self, rank)

    def next_message(self, rank: int) -> ArrivedMessage | None:
        """Wait for a rank's next message.

        Args:
            rank: of the producer.

        Returns:
            The message; None after the last one.

        Raises:
            CancelledError: the prefetch was cancelled.
            grpc.RpcError: the call failed.
        """
        stream, memory = self._streams[rank], self._memory
        with memory.changed:
            memory.changed.wait_for(lambda: stream.messages or stream.ended or stream.failure or self._over)
            self._check()
            if stream.messages:
                message = stream.messages.popleft()
                memory.used_bytes -= _size(message)
                memory.changed.notify_all()
                return message
            if stream.failure is not None:
                raise stream.failure
        return None

    def cancel_stream(self, rank: int) -> None:
        """End the transfer unless all of a rank's stream has come."""
        with self._memory.changed:
            if not self._streams[rank].ended:
                self._end()

    def cancel(self) -> None:
        """End the transfer, whoever has it."""
        with self._memory.changed:
            self._end()

    def cancel_unless_taken(self) -> bool:
        """End the transfer if no fetch took it over.

        Returns:
            Whether it was ended.
        """
        with self._memory.changed:
            if not self._taken:
                self._end()
            return not self._taken

    def _receive(self, begin: Callable[[], Any], stream: _Stream) -> None:
        with self._memory.changed:
            self._check()
            self._call = begin()
            self._begun_at = self._begun_at or time.monotonic()
        try:
            for message in self._call:
                self._put(stream, message)
        except grpc.RpcError as error:
            with self._memory.changed:
                stream.failure = error
                self._memory.changed.notify_all()
            raise
        with self._memory.changed:
            stream.ended = True
            self._memory.changed.notify_all()

    def _put(self, stream: _Stream, message: ArrivedMessage) -> None:
        """Keep a message, once there is room; meanwhile gRPC's flow control holds the producer up."""
        size, memory = _size(message), self._memory
        with memory.changed:
            memory.changed.wait_for(
                lambda: (
                    self._over
                    or memory.used_bytes + size <= memory.most_bytes
                    or (self._taken and not stream.messages)
                )
            )
            self._check()
            stream.messages.append(message)
            memory.used_bytes += size
            memory.changed.notify_all()

    def _check(self) -> None:
        if self._over:
            raise CancelledError("the KV that was announced is not wanted any more")

    def _end(self) -> None:
        self._over = True
        for stream in self._streams.values():
            self._memory.used_bytes -= sum(map(_size, stream.messages))
            stream.messages.clear()
        if self._call is not None:
            self._call.cancel()
        self._memory.changed.notify_all()


class TakenStream:
    """One rank's messages, which are read as a call of grpc is.

    Args:
        prefetch: that receives them.
        rank: of the producer.
    """

    def __init__(self, prefetch: Prefetch, rank: int) -> None:
        self._prefetch, self._rank = prefetch, rank

    def __iter__(self) -> "TakenStream":
        """Return itself."""
        return self

    def __next__(self) -> ArrivedMessage:
        """Return the next message once it is there.

        Raises:
            StopIteration: there is none any more.
            CancelledError: the prefetch was cancelled.
            grpc.RpcError: the call failed.
        """
        message = self._prefetch.next_message(self._rank)
        if message is None:
            raise StopIteration
        return message

    def cancel(self) -> None:
        """End the transfer unless all of this stream has come, as a call of grpc does."""
        self._prefetch.cancel_stream(self._rank)


class Prefetches:
    """The prefetches of a worker, by the transfers that they receive.

    Args:
        most_bytes: that they may hold together.
    """

    def __init__(self, most_bytes: int) -> None:
        self.memory = PrefetchMemory(most_bytes)
        self._lock = threading.Lock()
        self._open: dict[str, Prefetch] = {}
        self._running: set[Prefetch] = set()

    def add(self, prefetch: Prefetch) -> None:
        """Take in an announcement, in place of an earlier one of the same transfer."""
        transfer_id = prefetch.transfer.transfer_id
        with self._lock:
            self._running.add(prefetch)
            before = self._open.get(transfer_id)
            self._open[transfer_id] = prefetch
        if before is not None:
            before.cancel_unless_taken()

    def remove(self, transfer_id: str) -> Prefetch | None:
        """Forget a transfer.

        Args:
            transfer_id: names it.

        Returns:
            Its prefetch; None where there is none, or it has ended.
        """
        with self._lock:
            return self._open.pop(transfer_id, None)

    def forget(self, prefetch: Prefetch) -> None:
        """Take in that a prefetch has ended."""
        with self._lock:
            self._running.discard(prefetch)
            if self._open.get(prefetch.transfer.transfer_id) is prefetch:
                del self._open[prefetch.transfer.transfer_id]

    def stop(self) -> None:
        """Cancel all that run."""
        with self._lock:
            running = list(self._running)
        for one in running:
            one.cancel()


def _size(message: ArrivedMessage) -> int:
    return message.payload_bytes if isinstance(message, KvChunk) else 0
