"""Time operations by the clock, the processors or the GPU, several in turn, so that a disturbance hits all alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from spectrumkv.common.errors import InvalidArgumentError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def interleaved_medians(
    operations: Mapping[K, Callable[[], float]], rounds: int, on_round: Callable[[str], None] = lambda done: None
) -> dict[K, float]:
    """Run every operation once in each round, in turn; return the median seconds of each.

    A first round warms up and does not count.

    Args:
        operations: what to run; each call returns the seconds that it took.
        rounds: rounds that count, 1 or more.
        on_round: called after each round, the first included, with a text that says which round it was.

    Returns:
        Median seconds by name.

    Raises:
        InvalidArgumentError: there are no rounds.
    """
    check_rounds(rounds)
    seconds: dict[K, list[float]] = {name: [] for name in operations}
    for number in range(rounds + 1):
        for name, operation in operations.items():
            taken = operation()
            if number:
                seconds[name].append(taken)
        on_round(f"round {number} of {rounds}")
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def check_rounds(rounds: int) -> None:
    """Check `--rounds`.

    Raises:
        InvalidArgumentError: there are no rounds.
    """
    if rounds < 1:
        raise InvalidArgumentError(f"--rounds is {rounds}; allowed: 1 or more")


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Return an operation that does `work` and returns the seconds that it took."""

    def operation() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return operation


def timed_on_gpu(work: Callable[[], object]) -> Callable[[], float]:
    """Return an operation like that of `timed`, by the GPU's clock; the GPU is idle before and after `work`."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def operation() -> float:
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    return operation


def replayed(launches: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Capture launches in a CUDA graph.

    Args:
        launches: start kernels on the device; each is called twice, for Triton to compile and for the capture.

    Returns:
        A function that replays the graph, so that launching takes almost no time.
    """
    import torch

    for launch in launches:
        # Triton compiles at the first launch, which must not be captured.
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()

    def replay() -> None:
        # The closure keeps the launches, which hold the memory that the graph reads and writes.
        assert launches
        graph.replay()

    return replay


@dataclass
class Durations:
    """Collect how long one operation took, round by round.

    Attributes:
        seconds: on the clock.
        processor_seconds: of all cores.
    """

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def add(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, and keep the time that it took."""
        started, processor_started = time.perf_counter(), time.process_time()
        result = work()
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(time.process_time() - processor_started)
        return result

    @property
    def medians(self) -> tuple[float, float]:
        """Return the medians of both, without the first round, which warms up."""
        return statistics.median(self.seconds[1:]), statistics.median(self.processor_seconds[1:])
