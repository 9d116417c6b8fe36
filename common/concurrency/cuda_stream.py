"""Work on a request's KV beside the model's own on a GPU: a CUDA stream for each request.

On the model's stream it would wait for everything that the model was told to do before, and the model for it. On a
CPU there are no streams, and all of this does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def record_event(states: torch.Tensor) -> torch.cuda.Event | None:
    """Now, on the stream that computes these states; None on a CPU, where what was computed is there."""
    if not states.is_cuda:
        return None
    event: torch.cuda.Event = torch.cuda.current_stream(states.device).record_event()
    return event


class KvStream:
    """The stream of one request.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        # Small kernels, which would else wait for whatever the model keeps the whole GPU busy with.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @contextmanager
    def working(
        self, computed: torch.cuda.Event | None = None, states: tuple[torch.Tensor, ...] = ()
    ) -> Iterator[None]:
        """Put what the block does on this stream.

        Args:
            computed: what it waits for.
            states: of another stream, that it reads; their memory is not used again before it has.
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

    def settle(self) -> None:
        """Wait until all of it is done."""
        if self._stream is not None:
            self._stream.synchronize()
