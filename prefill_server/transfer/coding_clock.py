"""Tells how long scoring, tiering and encoding take, without the time in which a coder waits for the model."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spectrumkv.common.concurrency.cuda_stream import KvStream


class CodingClock:
    """Measures on a CPU, where a layer is computed before it is coded.

    Attributes:
        seconds: time of coding so far.
        coder_seconds: the coder's own share of that: its processor time, since waiting for a core that others use
            says nothing of the coder.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.coder_seconds = 0.0

    @contextmanager
    def coding(self, computed: torch.cuda.Event | None) -> Iterator[None]:
        """Count the time of a `with` block.

        Args:
            computed: on a GPU, the event after which the layer is computed.

        Yields:
            Nothing.
        """
        started, worked = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started
            self.coder_seconds += time.thread_time() - worked


@dataclass(frozen=True)
class _Span:
    """One stretch of coding: the layer's event, the one after the last kernel, and what the host saw."""

    computed: torch.cuda.Event
    ended: torch.cuda.Event
    host_seconds: float


class GpuCodingClock(CodingClock):
    """Measures on a GPU, whose stream waits for the model's layer while the host has gone on to wait for the bytes.

    Coding begins when the host asks for it or when the layer is computed, whichever is later. The GPU tells the time
    from the layer to the last kernel, and is asked later, when it has passed both, so that the host waits for
    neither. A request's last layer may be left out.

    Args:
        stream: on which layers are coded.
    """

    def __init__(self, stream: KvStream) -> None:
        super().__init__()
        self._stream = stream
        self._spans: deque[_Span] = deque()

    @contextmanager
    def coding(self, computed: torch.cuda.Event | None) -> Iterator[None]:
        """Count the time of a `with` block; see `CodingClock.coding`.

        Args:
            computed: the event after which the layer is computed; it and all earlier ones take times.

        Yields:
            Nothing.
        """
        started = time.monotonic()
        try:
            yield
        except BaseException:
            # The GPU may be what failed.
            self._add(time.monotonic() - started)
            raise
        host_seconds = time.monotonic() - started
        ended = self._stream.record_event()
        if computed is None or ended is None:
            self._add(host_seconds)
        else:
            self._spans.append(_Span(computed, ended, host_seconds))
        self._add_ended()

    def _add_ended(self) -> None:
        while self._spans and self._spans[0].ended.query():  # type: ignore[no-untyped-call]
            span = self._spans.popleft()
            self._add(min(span.host_seconds, span.computed.elapsed_time(span.ended) / 1000))

    def _add(self, seconds: float) -> None:
        self.seconds += seconds
        self.coder_seconds += seconds
