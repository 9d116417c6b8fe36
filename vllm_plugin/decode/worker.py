"""The consuming half of a worker: fetches on a bounded number of threads, and tells vLLM once how each one ended.

Beside the loads it receives transfers that were announced; vLLM does not wait for these.
"""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import torch

from spectrumkv.common.errors import CancelledError, InternalError, SpectrumKVError, UnavailableError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.transfer_methods import begin_fetch, release
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.v1 import transfer_pb2
from spectrumkv.vllm_plugin.decode.bases import StreamBases
from spectrumkv.vllm_plugin.decode.fetcher import ConsumerRank, Fetch, fetch_request, streams_needed
from spectrumkv.vllm_plugin.decode.prefetch import Prefetch, Prefetches
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.scheduler.steps import ConsumerStep, Load, TransferRef
from spectrumkv.vllm_plugin.stats import Tally

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndedLoads:
    """Loads that ended since the last look.

    Attributes:
        ended: requests whose pages are not written any more, each exactly once.
        failed: those of them whose KV is not there.
    """

    ended: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


class ConsumerWorker:
    """Runs the loads of a consuming worker.

    Args:
        consumer: this worker.
        options: of the connector.
        security: of the channels to producers.
        tally: counts loads.
    """

    def __init__(
        self, consumer: ConsumerRank, options: ConnectorOptions, security: ChannelSecurity, tally: Tally
    ) -> None:
        self._consumer, self._options, self._security, self._tally = consumer, options, security, tally
        self._bases = StreamBases(consumer.geometry)
        self._pool = ThreadPoolExecutor(
            options.fetches, thread_name_prefix="kv-fetch", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._prefetches = Prefetches(options.prefetch_memory)
        self._prefetch_pool = ThreadPoolExecutor(max(1, options.prefetches), thread_name_prefix="kv-prefetch")
        self._lock = threading.Lock()
        self._fetches: dict[str, Fetch] = {}
        self._channels: dict[str, grpc.Channel] = {}
        self._ended = EndedLoads()

    def begin_step(self, step: ConsumerStep) -> None:
        """Cancel, give up and start what the scheduler's side decided.

        Args:
            step: as it decided.
        """
        for request_id in step.cancels:
            with self._lock:
                fetch = self._fetches.get(request_id)
            if fetch is not None:
                fetch.cancel()
        for transfer_id in step.drops:
            unused = self._prefetches.remove(transfer_id)
            if unused is not None and unused.cancel_unless_taken():
                self._release_once(unused.transfer)
        for given_up in step.releases:
            if (unused := self._prefetches.remove(given_up.transfer_id)) is not None:
                unused.cancel()
            self._release_once(given_up)
        for announced in step.prefetches:
            self._begin_prefetch(announced)
        for load in step.loads:
            self._begin_fetch(load)

    def take_ended(self) -> EndedLoads:
        """Return the loads that ended since the last call."""
        with self._lock:
            taken, self._ended = self._ended, EndedLoads()
            return taken

    def stop(self) -> None:
        """Cancel all loads and wait for them."""
        with self._lock:
            fetches = list(self._fetches.values())
        for fetch in fetches:
            fetch.cancel()
        self._prefetches.stop()
        for pool in (self._pool, self._prefetch_pool):
            pool.shutdown(wait=True)
        for channel in self._channels.values():
            channel.close()

    def _begin_fetch(self, load: Load) -> None:
        prefetch = self._prefetches.remove(load.transfer_id)
        fetch = Fetch(load, self._consumer, self._bases, self._options.fetch_timeout, self._tally, prefetch)
        with self._lock:
            self._fetches[load.request_id] = fetch
        self._pool.submit(self._run, fetch)

    def _begin_prefetch(self, announced: TransferRef) -> None:
        with self._lock:
            is_late = any(one.load.transfer_id == announced.transfer_id for one in self._fetches.values())
        if is_late or not self._options.prefetches:
            self._tally.add("kv_prefetches_total", "late" if is_late else "off")
            return
        consumer = self._consumer
        ranks = streams_needed(consumer.heads, len(announced.addresses), consumer.geometry.kv_heads)
        prefetch = Prefetch(announced, ranks, self._prefetches.memory, self._options.fetch_timeout)
        self._prefetches.add(prefetch)
        self._prefetch_pool.submit(self._run_prefetch, prefetch)

    def _run_prefetch(self, prefetch: Prefetch) -> None:
        """Receive a transfer; where it does not come, its request's fetch will say so."""
        transfer, outcome = prefetch.transfer, "used"
        request = fetch_request(self._consumer, transfer)
        try:
            prefetch.run(lambda rank, timeout: begin_fetch(self._channel(transfer.addresses[rank]), request, timeout))
        except SpectrumKVError as error:
            outcome = error.code.lower()
            if not isinstance(error, CancelledError):
                logger.warning("transfer %s was announced: %s", transfer.transfer_id, error.message)
        except Exception:
            outcome = InternalError.code.lower()
            logger.exception("transfer %s was announced", transfer.transfer_id)
        self._prefetches.forget(prefetch)
        self._tally.add("kv_prefetches_total", outcome)

    def _run(self, fetch: Fetch) -> None:
        load, failure = fetch.load, None
        try:
            self._fetch(fetch)
        except SpectrumKVError as error:
            failure = error
        except Exception as error:  # vLLM must hear of every load, however it ended
            logger.exception("load of request %s", load.request_id)
            failure = InternalError(f"{type(error).__name__}: {error}")
        if failure is not None:
            self._tally.add("kv_loads_failed_total", failure.code.lower())
            if not isinstance(failure, CancelledError):
                logger.warning("request %s, transfer %s: %s", load.request_id, load.transfer_id, failure.message)
            self._release(load)
        with self._lock:
            del self._fetches[load.request_id]
            self._ended.ended.add(load.request_id)
            if failure is not None:
                self._ended.failed.add(load.request_id)

    def _fetch(self, fetch: Fetch) -> None:
        """Fetch, once more where the connection broke: the producer keeps what was not fetched to its end.

        Of several streams one may have come whole, which is not handed out again.

        Raises:
            UnavailableError: it broke twice, or one of several did.
        """
        channels = [self._channel(address) for address in fetch.load.addresses]
        try:
            fetch.run(channels)
        except UnavailableError as error:
            if len(channels) > 1:
                raise
            logger.warning("transfer %s is fetched once more: %s", fetch.load.transfer_id, error.message)
            fetch.run(channels)

    def _release_once(self, given_up: TransferRef) -> None:
        """Tell the producer what the scheduler's side decided, which every rank hears."""
        if self._consumer.rank == 0:
            self._release(given_up)

    def _release(self, given_up: TransferRef) -> None:
        """Tell the producer; where that fails, its time to live does it."""
        request = transfer_pb2.ReleaseRequest(transfer_id=given_up.transfer_id, request_id=given_up.request_id)
        for address in given_up.addresses:
            try:
                call = release(self._channel(address), request, self._options.fetch_timeout)
            except SpectrumKVError as error:
                logger.warning("transfer %s: %s", given_up.transfer_id, error.message)
                continue
            call.add_done_callback(_log_failure)

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if address not in self._channels:
                self._channels[address] = open_channel(address, self._security)
            return self._channels[address]


def _log_failure(call: "Future[object]") -> None:
    if not call.cancelled() and call.exception() is not None:
        logger.debug("a transfer could not be given up: %s", call.exception())
