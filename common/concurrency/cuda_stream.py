"""Gives the KV of each request a CUDA stream of its own, beside the model's stream.

On the model's stream this work would wait for all earlier kernels of the model, and the model's next ones for it.
On a CPU there are no streams, and this module does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def record_event(states: torch.Tensor) -> torch.cuda.Event | None:
    """Record an event on the stream that computes some states.

    Args:
        states: any shape and dtype.

    Returns:
        The event, which happens once `states` are computed, and can tell when; None on a CPU, where they are computed
        already.
    """
    if not states.is_cuda:
        return None
    return _recorded(torch.cuda.current_stream(states.device))


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def is_device_lost(error: BaseException) -> bool:
    """Return whether no call to the device will succeed again in this process, as after most errors of CUDA.

    Args:
        error: what a call raised, of torch or of Triton. Where memory ran out, the device is not lost.
    """
    told = str(error)
    of_device = isinstance(error, torch.AcceleratorError) or told.startswith("Triton Error [CUDA]")
    return of_device and "out of memory" not in told


class KvStream:
    """The CUDA stream of one request's KV.

    Args:
        device: the model's device; on a CPU the stream does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # High priority: these kernels are small, and would else wait while the model keeps the whole GPU busy.
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @contextmanager
    def working(
        self, computed: torch.cuda.Event | None = None, states: tuple[torch.Tensor, ...] = ()
    ) -> Iterator[None]:
        """Run the GPU work of a `with` block on this stream.

        Args:
            computed: the event that the work waits for; None if it waits for nothing.
            states: tensors of another stream that the work reads, any shapes and dtypes. torch uses their memory for
                nothing else before the work has read them.

        Yields:
            Nothing.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if computed is not None:
                self._stream.wait_event(computed)
            for one in states:
                one.record_stream(self._stream)
            yield

    def record_event(self) -> torch.cuda.Event | None:
        """Record an event after all work that this stream has so far; see the function of that name.

        Returns:
            The event; None on a CPU.
        """
        return None if self._stream is None else _recorded(self._stream)

    def synchronize(self) -> None:
        """Wait until all work on this stream is done."""
        if self._stream is not None:
            self._stream.synchronize()
