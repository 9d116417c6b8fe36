"""Prompts that wait for the model: short ones first, and no prompt waits for ever."""

import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

import torch

from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.prefill_server.engine.attention import KvHook
from spectrumkv.prefill_server.engine.chunked_prefill import ChunkedPrefill

T = TypeVar("T")

# How many later prompts may go before a prompt: in a flood of short prompts a long one still gets every fifth turn.
PASSED_OVER_AT_MOST = 4


@dataclass(frozen=True)
class PromptResult:
    """Holds what a prompt's forward passes leave, besides the KV that went through the hook.

    Attributes:
        logits: float32 `[vocab]` on the CPU, of the last position.
        queue_seconds: time before the first pass began, and between passes.
        compute_seconds: time that all passes took.
    """

    logits: torch.Tensor
    queue_seconds: float
    compute_seconds: float


@dataclass(eq=False)
class QueuedPrefill:
    """A prompt in the queue or in a pass.

    Attributes:
        token_ids: at least one.
        kv_hook: takes each layer's capture.
        chunked: the passes that the prompt takes, chunk by chunk where it is long.
        submitted: monotonic time.
        arrival: its number in the queue.
        computed_seconds: time that the passes so far took.
        outcome: the future that the prompt's submitter waits for.
    """

    token_ids: Sequence[int]
    kv_hook: KvHook
    chunked: ChunkedPrefill
    submitted: float = field(default_factory=time.monotonic)
    arrival: int = 0
    computed_seconds: float = 0.0
    outcome: "Future[PromptResult]" = field(default_factory=Future)

    def observe(self, capture: LayerCapture) -> None:
        """Show a layer to the hook; an error of the hook ends this prompt and leaves others of the pass alone."""
        if self.outcome.done():
            return
        try:
            self.kv_hook(capture)
        except Exception as error:  # noqa: BLE001  # the prompt's future carries it
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End with an error, unless nobody waits any more."""
        if isinstance(error, SpectrumKVError):
            # The frames that it came through hold the prompt and its KV, and the prompt's future holds the error.
            error.__traceback__ = None
        with suppress(InvalidStateError):
            self.outcome.set_exception(error)

    def succeed(self, result: PromptResult) -> None:
        """End with a result, unless the prompt has ended."""
        with suppress(InvalidStateError):
            self.outcome.set_result(result)


@dataclass(eq=False)
class _Waiting(Generic[T]):
    item: T
    tokens: int
    arrival: int
    passed_over: int = field(default=0)


class PromptQueue(Generic[T]):
    """Gives the shortest prompt first, except that one passed over too often goes before all others.

    A short prompt waits for the pass that runs and for shorter prompts only. A long prompt waits for those before it
    and for `limit` later ones.

    Args:
        limit: how many later prompts may go before a prompt.
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
        """Add an item.

        Args:
            item: stands for a prompt.
            tokens: how many of the prompt's tokens are still to be computed.
            arrival: number of an item that was here before, and gets its place again.

        Returns:
            The number of the item's arrival.
        """
        with self._lock:
            number = next(self._arrivals) if arrival is None else arrival
            insort(self._waiting, _Waiting(item, tokens, number), key=lambda one: one.arrival)
            return number

    def remove(self, arrival: int) -> None:
        """Take out the item with this number, if it is here: nobody waits for it any more."""
        with self._lock:
            self._waiting = [one for one in self._waiting if one.arrival != arrival]

    def take(self, fits: Callable[[T], bool] = lambda _: True) -> T | None:
        """Take out the next item.

        Args:
            fits: whether the caller can use the next item.

        Returns:
            None where no item is left, or the next one does not fit.
        """
        with self._lock:
            if not self._waiting:
                return None
            overdue = (one for one in self._waiting if one.passed_over >= self._limit)
            chosen = next(overdue, None) or min(self._waiting, key=lambda one: one.tokens)
            if not fits(chosen.item):
                return None
            position = self._waiting.index(chosen)
            for earlier in self._waiting[:position]:
                earlier.passed_over += 1
            del self._waiting[position]
            return chosen.item
