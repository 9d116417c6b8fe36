"""Says which decode workers there are: those given by address, and one for each address of each name."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.workers.names import FollowedName, Resolve, resolve
from spectrumkv.prefill_server.workers.worker import EXPECTED_SECONDS, DecodeWorker

logger = logging.getLogger(__name__)

# Makes a worker of an address and of the name that its certificate must be for; None where that is the address.
MakeWorker = Callable[[Address, str | None], DecodeWorker]


class WorkerRoster:
    """Holds the workers, adds one for each new address of a name, and lets go of those whose address is gone.

    A worker whose address is gone gets no new request; it is closed after its last one has ended. An address that
    comes back before that keeps its worker. While a name does not resolve, its workers stay: a name server that is
    away says nothing of them, and their own health does.

    Args:
        targets: the addresses and names of `--decode`.
        make_worker: makes a worker.
        metrics: shows which names resolve.
        seconds: between two look-ups of a name.
        on_change: called, from any thread, when workers were added or left.
        on_gone: called with the address of a worker that was closed.
        look_up: finds a name's addresses.
    """

    def __init__(
        self,
        targets: Sequence[Address],
        make_worker: MakeWorker,
        metrics: Metrics,
        seconds: float,
        on_change: Callable[[], None],
        on_gone: Callable[[str], None] = lambda worker: None,
        look_up: Resolve = resolve,
    ) -> None:
        self._make_worker = make_worker
        self._on_change = on_change
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._given = frozenset(target for target in targets if target.ip_version is not None)
        self._members = {address: make_worker(address, None) for address in targets if address in self._given}
        self._names = [
            FollowedName(target, seconds, self._take, look_up) for target in targets if target.ip_version is None
        ]
        self._found: dict[Address, frozenset[Address]] = {}
        self._unusable: set[Address] = set()
        self._closed = False
        self._started_at = time.monotonic()
        for one in self._names:
            metrics.decode_name_resolved.labels(str(one.name)).set_function(partial(_resolves, one))

    def start(self) -> None:
        """Begin to follow the workers and the names."""
        self._started_at = time.monotonic()
        for worker in self.workers:
            worker.start()
        for one in self._names:
            one.start()

    @property
    def workers(self) -> tuple[DecodeWorker, ...]:
        """Those that may get requests."""
        with self._lock:
            return tuple(worker for worker in self._members.values() if not worker.leaving)

    @property
    def unresolved(self) -> list[FollowedName]:
        """Names that stand for no worker, since none of their look-ups has found an address."""
        with self._lock:
            return [one for one in self._names if one.name not in self._found]

    @property
    def any_expected(self) -> bool:
        """Whether a worker that takes no requests yet is likely to do so soon.

        A name that was never found counts only where there is no worker at all: requests must not wait for it.
        """
        workers = self.workers
        if workers:
            return any(worker.expected for worker in workers)
        return time.monotonic() - self._started_at < EXPECTED_SECONDS

    def close(self) -> None:
        """Close all channels, and end the threads that follow workers and names."""
        for one in self._names:
            one.close()
        with self._lock:
            self._closed = True
            members = list(self._members.values())
        for worker in members:
            worker.close()

    def _take(self, name: FollowedName, found: frozenset[Address]) -> None:
        """Take in a name's addresses."""
        with self._lock:
            if self._closed:
                return
            self._found[name.name] = found
            self._unusable.intersection_update(frozenset().union(*self._found.values()))
            changed = self._add(name.name, found - self._members.keys())
            changed = self._mark_leaving() or changed
            gone = [worker for worker in self._members.values() if worker.leaving and worker.retire()]
            for worker in gone:
                del self._members[worker.address]
        for worker in gone:
            worker.close()
            logger.info("decode worker %s has left", worker.address)
            self._on_gone(str(worker.address))
        if changed:
            self._on_change()

    def _add(self, name: Address, addresses: frozenset[Address]) -> bool:
        """Make a worker for each address.

        Returns:
            Whether there is any new one.
        """
        before = len(self._members)
        for address in sorted(addresses, key=str):
            try:
                worker = self._make_worker(address, name.host)
            except InvalidArgumentError as error:
                # Plaintext to another machine, or files that are being replaced: the next look-up tries again.
                if address not in self._unusable:
                    logger.error("%s, an address of %s, cannot be used: %s", address, name.host, error.message)
                self._unusable.add(address)
                continue
            self._unusable.discard(address)
            self._members[address] = worker
            worker.start()
            logger.info("decode worker %s joins: an address of %s", address, name.host)
        return len(self._members) > before

    def _mark_leaving(self) -> bool:
        """Have those leave whose address is gone, and those stay whose address is back.

        Returns:
            Whether there is any such worker.
        """
        wanted = self._given.union(*self._found.values())
        changed = [worker for address, worker in self._members.items() if worker.leaving == (address in wanted)]
        for worker in changed:
            worker.leaving = not worker.leaving
            logger.info(
                "decode worker %s %s",
                worker.address,
                "gets no more requests: no name has its address any more" if worker.leaving else "stays",
            )
        return bool(changed)


def _resolves(name: FollowedName) -> bool:
    return name.failure is None
