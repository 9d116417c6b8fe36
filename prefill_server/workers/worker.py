"""One decode worker as prefill knows it: whether it takes requests, and how much room it has."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, decode_info_method, open_decode_stream
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import BASIS, Metrics
from spectrumkv.prefill_server.workers.basis_upload import BasisUpload
from spectrumkv.v1 import decode_pb2

logger = logging.getLogger(__name__)

# How old what is known of a worker's room may be. What this process reserves itself is known exactly.
ROOM_SECONDS = 0.5
ROOM_TIMEOUT_SECONDS = 2.0
# A watch that lasts would hold a connection made with certificates that are out of date.
WATCH_SECONDS = 300.0
# Who has not come after this long, from the start or since it shut down, is not expected any more.
EXPECTED_SECONDS = 60.0
# One that was never there after so long may have been misspelt: services that start together are there sooner.
LATE_SECONDS = 5.0
# Before a watch that ended is begun anew; that then waits for the connection.
PAUSE_SECONDS = 0.1
_TOO_MANY_WATCHERS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)


class DecodeWorker:
    """A decode worker, followed by a thread that hears of its health and one that asks for its room.

    Args:
        address: where it is.
        security: how the channel to it is guarded.
        metrics: shows what is known of it.
        on_change: called, from any thread, when it begins or ceases to take requests.

    Attributes:
        address: where it is.
        channel: to it.
        open_stream: starts a Decode RPC with it.
        epoch: how often it began to take requests; a refusal says nothing of its next epoch.
        basis_upload: sends it the codec's basis.
    """

    def __init__(
        self, address: Address, security: ChannelSecurity, metrics: Metrics, on_change: Callable[[], None]
    ) -> None:
        self.address = address
        self.epoch = 0
        self.channel = open_channel(str(address), security)
        self.open_stream = open_decode_stream(self.channel)
        self._ask_for_room = decode_info_method(self.channel)
        self._on_change = on_change
        self.basis_upload = BasisUpload(address, self.channel, metrics.kv_bytes_sent.labels(BASIS))
        self._lock = threading.Lock()
        self._answers = False
        # What it says of itself: None where nothing is known.
        self._serving: bool | None = None
        self._followed_since = time.monotonic()
        self._left_at: float | None = None
        self._slots = self._others = self._own = 0
        self._closed, self._due = threading.Event(), threading.Event()
        metrics.decode_worker_accepting.labels(str(address)).set_function(lambda: self.accepting)
        metrics.decode_worker_slots_free.labels(str(address)).set_function(lambda: self.free_slots)
        self._threads = [
            threading.Thread(target=follow, name=f"{what}-{address}", daemon=True)
            for what, follow in (("health", self._follow_health), ("room", self._follow_room))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def accepting(self) -> bool:
        """Whether it answers and, as far as is known, takes requests."""
        return self._answers and self._serving is not False

    @property
    def expected(self) -> bool:
        """Whether it is likely to come soon: it said lately that it shuts down, or may still be starting."""
        since = self._followed_since if self.epoch == 0 else self._left_at
        return not self.accepting and since is not None and time.monotonic() - since < EXPECTED_SECONDS

    @property
    def free_slots(self) -> int:
        """Slots that nobody has reserved, as far as is known; 0 where it does not take requests."""
        return max(0, self._slots - self._others - self._own) if self.accepting else 0

    @contextmanager
    def holding(self, slots: int) -> Iterator[None]:
        """Count slots as reserved by this process for as long as the block runs."""
        with self._lock:
            self._own += slots
        try:
            yield
        finally:
            with self._lock:
                self._own -= slots

    def lost(self, leaving: bool) -> None:
        """Take in that it failed a request; it is asked last until it answers again.

        Args:
            leaving: it refused because it shuts down.
        """
        if leaving:
            self._left_at = time.monotonic()
        self._learn(answers=False)
        self._due.set()

    def close(self) -> None:
        """Close the channel and end the threads."""
        self._closed.set()
        self._due.set()
        self.channel.close()
        for thread in self._threads:
            thread.join()

    def _learn(self, answers: bool | None = None, serving: bool | None = None, watched: bool = True) -> None:
        """Take in what was found out; None is nothing new.

        Args:
            answers: whether it answers.
            serving: what it says of itself.
            watched: whether what it said of itself still counts.
        """
        with self._lock:
            before = self.accepting
            if answers is not None:
                self._answers = answers
            if serving is not None or not watched:
                self._serving = serving
            if self._serving is False:
                self._left_at = time.monotonic()
            elif self.accepting:
                self._left_at = None
            changed = self.accepting is not before
            self.epoch += changed and not before
        if changed:
            if not self._closed.is_set():
                logger.info("decode worker %s %s requests", self.address, "takes" if self.accepting else "takes no")
            self._on_change()

    def _follow_health(self) -> None:
        """Hear from the worker itself when it is ready and when it begins to shut down."""
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        while not self._closed.is_set():
            try:
                watch = health_pb2_grpc.HealthStub(self.channel).Watch(
                    request, timeout=WATCH_SECONDS, wait_for_ready=True
                )
                for response in watch:
                    self._learn(serving=response.status == health_pb2.HealthCheckResponse.SERVING)
                    self._due.set()
                # One that ends a watch in order would be asked for the next one at once, for ever.
                self._closed.wait(PAUSE_SECONDS)
            except ValueError:
                # What gRPC raises for a call on a channel that another thread has closed.
                return
            except grpc.RpcError as error:
                self._watch_ended(error.code())

    def _watch_ended(self, code: grpc.StatusCode) -> None:
        if code in _TOO_MANY_WATCHERS:
            # It has no place for another watcher. Whether it answers says enough.
            self._learn(watched=False)
            self._closed.wait(WATCH_SECONDS)
        elif code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self._learn(answers=False, watched=False)
            self._due.set()
            self._closed.wait(PAUSE_SECONDS)

    def _follow_room(self) -> None:
        """Ask how many slots are reserved, again and again."""
        request = decode_pb2.DecodeServiceGetServerInfoRequest()
        missed = False
        while not self._closed.is_set():
            self._due.clear()
            try:
                info = self._ask_for_room(request, timeout=ROOM_TIMEOUT_SECONDS)
            except ValueError:
                return
            except grpc.RpcError:
                info = None
            # gRPC also gives None where a damaged stream ended with OK and no message.
            if info is not None:
                with self._lock:
                    self._slots = info.slots_total
                    self._others = max(0, info.slots_used - self._own)
            self._learn(answers=info is not None)
            late = self.epoch == 0 and time.monotonic() - self._followed_since > LATE_SECONDS
            if info is None and late and not missed:
                missed = True
                logger.warning("decode worker %s does not answer yet", self.address)
            self._due.wait(ROOM_SECONDS)
