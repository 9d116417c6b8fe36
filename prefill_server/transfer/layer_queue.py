"""Hands layers from the model's thread to the thread that sends them."""

import threading
from collections import deque
from collections.abc import Iterator

from prometheus_client import Gauge

from spectrumkv.common.errors import CancelledError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry


class LayerQueue:
    """Holds the layers of one prompt that wait to be sent, and counts the memory that they hold.

    Args:
        geometry: shape and dtype of the model's cache.
        resident_bytes: the gauge of KV bytes held for requests.
    """

    def __init__(self, geometry: KvGeometry, resident_bytes: Gauge) -> None:
        self._geometry = geometry
        self._resident_bytes = resident_bytes
        self._changed = threading.Condition()
        self._layers: deque[LayerCapture] = deque()
        self._all_put = False
        self._closed = False

    @property
    def complete(self) -> bool:
        """Whether every layer was put and none was dropped."""
        return self._all_put and not self._closed

    @property
    def empty(self) -> bool:
        """Whether no layer waits."""
        return not self._layers

    @property
    def closed(self) -> bool:
        """Whether the layers are no longer wanted."""
        return self._closed

    def put_layer(self, capture: LayerCapture) -> None:
        """Append a layer.

        Args:
            capture: the layer's queries, keys and values.

        Raises:
            CancelledError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise CancelledError("the request ended while its prompt was being computed")
            self._layers.append(capture)
            self._resident_bytes.inc(self._bytes(capture))
            self._changed.notify()

    def end(self) -> None:
        """Take in that every layer has been put."""
        with self._changed:
            self._all_put = True
            self._changed.notify()

    def close(self) -> None:
        """Drop the layers that wait and end `layers`; a second call does nothing."""
        with self._changed:
            self._closed = True
            while self._layers:
                self._pop()
            self._changed.notify()

    def layers(self) -> Iterator[LayerCapture]:
        """Wait for layers.

        Yields:
            Each layer, until all were put and none is left, or the queue is closed.
        """
        while (capture := self._next()) is not None:
            yield capture

    def _next(self) -> LayerCapture | None:
        with self._changed:
            self._changed.wait_for(lambda: self._layers or self._all_put or self._closed)
            return self._pop() if self._layers else None

    def _pop(self) -> LayerCapture:
        capture = self._layers.popleft()
        self._resident_bytes.dec(self._bytes(capture))
        return capture

    def _bytes(self, capture: LayerCapture) -> int:
        return capture.keys.shape[1] * self._geometry.native_bytes_per_token_layer
