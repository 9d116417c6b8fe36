"""Put what happens on a GPU on the clock of the machine, which all of its processes share."""

import time

import torch

# A moment: an event on a stream, or the time on the machine's monotonic clock.
Mark = torch.cuda.Event | float


class DeviceClock:
    """Tell when work on a device is done, in seconds of `time.monotonic`.

    On Linux `time.monotonic` is CLOCK_MONOTONIC, so times of two processes can be compared.

    Args:
        device: where the work runs. On a CPU work is done when the call that does it returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._anchor: Mark = time.monotonic()
        self._anchored_at = self._anchor

    def anchor(self) -> None:
        """Wait until the device is idle, and set its clock by the machine's; call this before each measurement."""
        if self._device.type == "cpu":
            return
        torch.cuda.synchronize(self._device)
        before = time.monotonic()
        self._anchor = self._record()
        self._anchor.synchronize()
        # The event happened in between, which takes a few microseconds.
        self._anchored_at = (before + time.monotonic()) / 2

    def mark(self) -> Mark:
        """Return the moment at which the work that the current stream was given so far is done."""
        return time.monotonic() if self._device.type == "cpu" else self._record()

    def seconds(self, mark: Mark) -> float:
        """Return a moment in seconds of `time.monotonic`, after waiting for it."""
        if isinstance(mark, float) or isinstance(self._anchor, float):
            assert isinstance(mark, float)
            return mark
        mark.synchronize()
        milliseconds: float = self._anchor.elapsed_time(mark)
        return self._anchored_at + milliseconds / 1e3

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
