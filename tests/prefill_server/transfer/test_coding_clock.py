"""What counts as coding, on a CPU and beside a GPU that tells its own time."""

import time
from dataclasses import dataclass
from typing import Any, cast

import pytest

from spectrumkv.common.concurrency.cuda_stream import KvStream
from spectrumkv.prefill_server.transfer import coding_clock
from spectrumkv.prefill_server.transfer.coding_clock import CodingClock, GpuCodingClock


@dataclass
class Event:
    """An event of a GPU that happens at a time."""

    seconds: float
    passed: bool = True

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.seconds - self.seconds)


@dataclass
class Stream:
    """A stream whose last kernel ends when it is said."""

    last: Event

    def record_event(self) -> Event:
        return self.last


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the clock reads."""
    at = [100.0]
    monkeypatch.setattr(coding_clock.time, "monotonic", lambda: at[0])
    return at


def coded(clock: CodingClock, computed: Event, now: list[float], host_seconds: float) -> None:
    with clock.coding(cast(Any, computed)):
        now[0] += host_seconds


def test_waiting_for_the_model_does_not_count(now: list[float]) -> None:
    # The host asks at 100, the layer is computed at 103, its bytes are there at 103.5.
    clock = GpuCodingClock(cast(KvStream, Stream(Event(103.5))))
    coded(clock, Event(103.0), now, 3.5)
    assert clock.seconds == clock.coder_seconds == pytest.approx(0.5)


def test_what_a_layer_waits_for_the_coder_does_not_count(now: list[float]) -> None:
    # The layer was computed at 90, and the host came to it at 100.
    clock = GpuCodingClock(cast(KvStream, Stream(Event(100.5))))
    coded(clock, Event(90.0), now, 0.5)
    assert clock.seconds == pytest.approx(0.5)


def test_a_gpu_is_asked_once_it_has_passed(now: list[float]) -> None:
    stream = Stream(Event(101.0, passed=False))
    clock = GpuCodingClock(cast(KvStream, stream))
    coded(clock, Event(100.25), now, 1.0)
    assert clock.seconds == 0
    stream.last.passed = True
    stream.last = Event(102.0)
    coded(clock, Event(101.5), now, 1.0)
    assert clock.seconds == pytest.approx(0.75 + 0.5)


def test_an_error_is_timed_too(now: list[float]) -> None:
    clock = GpuCodingClock(cast(KvStream, Stream(Event(101.0))))

    def fail() -> None:
        with clock.coding(cast(Any, Event(100.0))):
            now[0] += 1.0
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert clock.seconds == pytest.approx(1.0)


def test_a_cpu_counts_all_time_and_the_processors() -> None:
    clock = CodingClock()
    until = time.monotonic() + 0.02
    with clock.coding(None):
        while time.monotonic() < until:
            pass
    assert clock.seconds >= 0.019
    assert 0 < clock.coder_seconds <= clock.seconds + 0.01
