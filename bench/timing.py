"""Timing of several operations side by side, so that what disturbs the machine disturbs all of them alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from spectrumkv.common.errors import InvalidArgumentError

K = TypeVar("K", bound=Hashable)


def interleaved_medians(
    operations: Mapping[K, Callable[[], float]], rounds: int, on_round: Callable[[str], None] = lambda done: None
) -> dict[K, float]:
    """Run every operation once in each round, in turn; return each one's median seconds.

    A first round warms up and does not count.

    Args:
        operations: what to run; each returns how many seconds it took.
        rounds: rounds that count, 1 or more.
        on_round: called after each round, the first included, with what has been done.

    Raises:
        InvalidArgumentError: there are no rounds.
    """
    if rounds < 1:
        raise InvalidArgumentError(f"--rounds is {rounds}; allowed: 1 or more")
    seconds: dict[K, list[float]] = {name: [] for name in operations}
    for number in range(rounds + 1):
        for name, operation in operations.items():
            taken = operation()
            if number:
                seconds[name].append(taken)
        on_round(f"round {number} of {rounds}")
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Return an operation that does `work` and tells the seconds it took."""

    def operation() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return operation


def timed_on_gpu(work: Callable[[], object]) -> Callable[[], float]:
    """`timed` by the clock of the GPU, which is idle when `work` begins and when its time ends."""
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
