"""One decode worker as prefill knows it: whether it takes requests, its room, the basis it has, and how to ask it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, decode_info_method, open_decode_stream
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import BASIS, Metrics
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.workers.basis_upload import BasisUpload
from spectrumkv.prefill_server.workers.circuit_breaker import CircuitBreaker
from spectrumkv.prefill_server.workers.lease import DecodeLease, open_lease
from spectrumkv.prefill_server.workers.token_pace import TokenPace
from spectrumkv.v1 import decode_pb2

logger = logging.getLogger(__name__)

# How often a worker is asked for its room. What this process reserves itself counts at once.
ROOM_SECONDS = 0.5
ROOM_TIMEOUT_SECONDS = 2.0
# A watch ends after so long, since it would hold on to a connection whose certificates may be out of date.
WATCH_SECONDS = 300.0
# Stop waiting for a worker that never answered, or shut down, so long ago.
EXPECTED_SECONDS = 60.0
# Warn of a worker that has not answered for so long since the start: its address may be misspelt, since services that
# start together answer sooner.
LATE_SECONDS = 5.0
# Pause before a watch that ended is begun again; the new watch waits for the connection.
PAUSE_SECONDS = 0.1
_TOO_MANY_WATCHERS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)


class DecodeWorker:
    """Follows a decode worker, once started: threads watch its health, ask for its room, and send it the basis.

    Args:
        address: where the worker is.
        security: how the channel to the worker is guarded.
        metrics: shows whether the worker takes requests and how many slots are free.
        on_change: called, from any thread, when the worker begins or ceases to take requests.
        basis: of the model, sent as soon as the worker takes requests; None where there is none.

    Attributes:
        address: where the worker is.
        channel: to the worker.
        open_stream: starts a Decode RPC with the worker.
        epoch: how often the worker began to take requests; a refusal says nothing of the next epoch.
        basis_upload: sends the worker the codec's basis.
        breaker: says whether the worker fails what it admits.
        leaving: whether it gets no new requests, since its address is gone; running ones go on.
        pace: says how long its tokens take.
    """

    def __init__(
        self,
        address: Address,
        security: ChannelSecurity,
        metrics: Metrics,
        on_change: Callable[[], None],
        basis: Basis | None = None,
    ) -> None:
        self.address = address
        self.epoch = 0
        self.leaving = False
        self.breaker = CircuitBreaker()
        self.pace = TokenPace()
        self.channel = open_channel(str(address), security)
        self.open_stream = open_decode_stream(self.channel)
        self._ask_for_room = decode_info_method(self.channel)
        self._metrics = metrics
        self._on_change = on_change
        self.basis_upload = BasisUpload(address, self.channel, basis, metrics.kv_bytes_sent.labels(BASIS))
        self._lock = threading.Lock()
        self._answers = False
        # What its health service says; None where that is unknown.
        self._serving: bool | None = None
        self._followed_since = time.monotonic()
        self._left_at: float | None = None
        self._slots = self._others = self._own = 0
        self._requests = 0
        self._retired = False
        self._closed, self._due = threading.Event(), threading.Event()
        metrics.decode_worker_accepting.labels(str(address)).set_function(lambda: self.accepting)
        metrics.decode_worker_ejected.labels(str(address)).set_function(lambda: self.breaker.ejected)
        metrics.decode_worker_token_seconds.labels(str(address)).set_function(lambda: self.pace.seconds or 0.0)
        metrics.decode_worker_slots_free.labels(str(address)).set_function(lambda: self.free_slots)
        self._gauges = (
            metrics.decode_worker_accepting,
            metrics.decode_worker_ejected,
            metrics.decode_worker_slots_free,
            metrics.decode_worker_token_seconds,
        )
        self._threads = [
            threading.Thread(target=follow, name=f"{what}-{address}", daemon=True)
            for what, follow in (("health", self._follow_health), ("room", self._follow_room))
        ]

    def start(self) -> None:
        """Start the threads."""
        self._followed_since = time.monotonic()
        self.basis_upload.start()
        for thread in self._threads:
            thread.start()

    @property
    def accepting(self) -> bool:
        """Whether the worker answers and, as far as prefill knows, takes requests."""
        return self._answers and self._serving is not False

    @property
    def expected(self) -> bool:
        """Whether the worker is likely to take requests soon: it is starting, or shut down lately to be replaced."""
        since = self._followed_since if self.epoch == 0 else self._left_at
        return not self.accepting and since is not None and time.monotonic() - since < EXPECTED_SECONDS

    @property
    def free_slots(self) -> int:
        """Slots that nobody has reserved, as far as prefill knows; 0 where the worker takes no requests."""
        return max(0, self._slots - self._others - self._own) if self.accepting else 0

    @property
    def total_slots(self) -> int:
        """Slots of the worker's pool, as far as prefill knows; 0 where the worker takes no requests."""
        return self._slots if self.accepting else 0

    @contextmanager
    def holding(self, slots: int) -> Iterator[None]:
        """Count a request and its slots as this process's for as long as the block runs."""
        with self._lock:
            self._own += slots
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._own -= slots
                self._requests -= 1

    def open_lease(self, pipeline: KvPipeline, scope: RpcScope) -> DecodeLease:
        """Start a Decode stream with the worker.

        Args:
            pipeline: makes the messages to send.
            scope: the client's RPC; when it ends, so does the stream.

        Returns:
            The lease, whose admission the caller waits for next.

        Raises:
            UnavailableError: the worker has left; the message names it.
        """
        if self._retired:
            raise UnavailableError(f"decode worker {self.address} has left: no name has its address any more")
        self.pace.begin()
        return open_lease(self.address, self.open_stream, pipeline, scope, self._metrics, self.pace)

    def lost(self, leaving: bool) -> None:
        """Take in that the worker failed a request; it is asked last until it answers again.

        Args:
            leaving: whether it refused because it shuts down.
        """
        if leaving:
            self._left_at = time.monotonic()
        self._learn(answers=False)
        self._due.set()

    def retire(self) -> bool:
        """Let go of the worker if no request holds it; the caller then closes it.

        Returns:
            Whether no request holds the worker. From now on none can: a lease on it is refused.
        """
        with self._lock:
            if self._requests:
                return False
            self._retired = True
        # Here, since a new worker at the same address may be made before this one is closed.
        for gauge in self._gauges:
            gauge.remove(str(self.address))
        return True

    def close(self) -> None:
        """Close the channel and end the threads."""
        self._closed.set()
        self._due.set()
        self.channel.close()
        self.basis_upload.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _learn(self, answers: bool | None = None, serving: bool | None = None, watched: bool = True) -> None:
        """Take in news of the worker.

        Args:
            answers: whether the worker answers; None for no news.
            serving: what its health service says; None for no news.
            watched: whether what its health service said before still counts.
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
            if not before:
                self.basis_upload.request()
            if not self._closed.is_set():
                logger.info("decode worker %s %s requests", self.address, "takes" if self.accepting else "takes no")
            self._on_change()

    def _follow_health(self) -> None:
        """Watch the worker's health service, which says when it is ready and when it begins to shut down."""
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        while not self._closed.is_set():
            try:
                watch = health_pb2_grpc.HealthStub(self.channel).Watch(
                    request, timeout=WATCH_SECONDS, wait_for_ready=True
                )
                for response in watch:
                    self._learn(serving=response.status == health_pb2.HealthCheckResponse.SERVING)
                    self._due.set()
                # A worker that ends each watch with OK would otherwise be asked without a pause.
                self._closed.wait(PAUSE_SECONDS)
            except ValueError:
                # gRPC raises this for a call on a channel that another thread has closed.
                return
            except grpc.RpcError as error:
                self._watch_ended(error.code())

    def _watch_ended(self, code: grpc.StatusCode) -> None:
        if code in _TOO_MANY_WATCHERS:
            # The worker serves no further watcher. Whether it answers says enough.
            self._learn(watched=False)
            self._closed.wait(WATCH_SECONDS)
        elif code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self._learn(answers=False, watched=False)
            self._due.set()
            self._closed.wait(PAUSE_SECONDS)

    def _follow_room(self) -> None:
        """Ask how many slots are reserved, every `ROOM_SECONDS` or when there is news."""
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
