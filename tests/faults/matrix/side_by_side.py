"""Faults that only silence tells of, injected side by side: most of their eight seconds is waiting."""

import contextlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.faults.deployment import Deployment, running_deployment
from tests.faults.incubator import Incubator
from tests.faults.matrix.kinds import Fault
from tests.faults.matrix.matrix import inject, reference_of

# More would keep two cores busier with requests that must go on than the limits of time allow for.
LANES = 3

Cell = tuple[str, str]


@dataclass(frozen=True)
class Lane:
    """A deployment, and what a bystander gets on it when nothing goes wrong."""

    deployment: Deployment
    reference: list[int]

    def inject(self, fault: Fault, phase: str) -> float:
        """See `matrix.inject`."""
        return inject(self.deployment, self.reference, fault, phase)


class SideBySide:
    """Injects faults on whichever lane is free, one at a time on each.

    Args:
        lanes: quiet deployments.
        cells: faults and phases.
    """

    def __init__(self, lanes: Sequence[Lane], cells: Sequence[tuple[Fault, str]]) -> None:
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in lanes:
            self._free.put(lane)
        self._pool = ThreadPoolExecutor(len(lanes))
        self._outcomes: dict[Cell, Future[float]] = {
            (fault.name, phase): self._pool.submit(self._inject, fault, phase) for fault, phase in cells
        }

    def told_after(self, fault: Fault, phase: str) -> float:
        """Wait for one of them; return after how many seconds the client was told, or raise what was wrong."""
        return self._outcomes[fault.name, phase].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _inject(self, fault: Fault, phase: str) -> float:
        lane = self._free.get()
        try:
            return lane.inject(fault, phase)
        finally:
            self._free.put(lane)


@contextlib.contextmanager
def running_lanes(directory: Path, incubator: Incubator, count: int, secured: bool) -> Iterator[list[Lane]]:
    """Start so many deployments, all at once."""
    with contextlib.ExitStack() as running, ThreadPoolExecutor(count) as pool:

        def start(number: int) -> Deployment:
            place = directory / str(number)
            place.mkdir()
            return running.enter_context(running_deployment(place, incubator, secured))

        deployments = list(pool.map(start, range(count)))
        yield [Lane(deployment, reference_of(deployment)) for deployment in deployments]
