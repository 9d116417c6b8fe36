"""Prompts that wait for the model: short ones first, and nobody for ever."""

import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

# How many later prompts may go before one: in a flood of short prompts a long one still gets every fifth turn.
PASSED_OVER_AT_MOST = 4


@dataclass(eq=False)
class _Waiting(Generic[T]):
    item: T
    tokens: int
    arrival: int
    passed_over: int = field(default=0)


class PromptQueue(Generic[T]):
    """Gives the shortest prompt first, except that one passed over too often goes before all others.

    A short prompt so waits for no more than what runs and what is shorter, and a long one for those before it and
    `limit` later ones.

    Args:
        limit: how many later prompts may go before one.
    """

    def __init__(self, limit: int = PASSED_OVER_AT_MOST) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._arrivals = count()
        # In order of arrival.
        self._waiting: list[_Waiting[T]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: T, tokens: int, arrival: int | None = None) -> int:
        """Add an item that stands for a prompt of so many tokens; return the number of its arrival.

        Args:
            item: what to add.
            tokens: that are to be computed.
            arrival: of an item that was here before, and gets its place again.
        """
        with self._lock:
            number = next(self._arrivals) if arrival is None else arrival
            insort(self._waiting, _Waiting(item, tokens, number), key=lambda one: one.arrival)
            return number

    def remove(self, arrival: int) -> None:
        """Take an item out that nobody waits for any more, by its number; one that is not there is fine."""
        with self._lock:
            self._waiting = [one for one in self._waiting if one.arrival != arrival]

    def take(self, fits: Callable[[T], bool] = lambda _: True) -> T | None:
        """Take out the next item; None where there is none, or where it does not fit."""
        with self._lock:
            if not self._waiting:
                return None
            overdue = (one for one in self._waiting if one.passed_over >= self._limit)
            chosen = next(overdue, None) or min(self._waiting, key=lambda one: one.tokens)
            if not fits(chosen.item):
                return None
            place = self._waiting.index(chosen)
            for earlier in self._waiting[:place]:
                earlier.passed_over += 1
            del self._waiting[place]
            return chosen.item
