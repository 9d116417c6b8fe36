"""Watch prefill's half of a hand-off: the service's own pipeline, with notes of when each layer passed each stage."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from spectrumkv.bench.device.timeline.clock import DeviceClock, Mark
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import KvEncoder
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import Request
from spectrumkv.prefill_server.transfer.pipeline import KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan


@dataclass
class PrefillMarks:
    """Hold prefill's moments of one hand-off.

    Attributes:
        computed: by layer, when its last keys and values were computed.
        coding: by layer, when coding of what was computed last began.
        coded: by layer, when its last segment was coded, in host memory.
        handed_over: by sequence number, when a chunk was handed over to gRPC.
    """

    computed: dict[int, Mark] = field(default_factory=dict)
    coding: dict[int, float] = field(default_factory=dict)
    coded: dict[int, float] = field(default_factory=dict)
    handed_over: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WatchedEncoder:
    """Encode as another encoder does, and note when; see `KvEncoder`."""

    encoder: KvEncoder
    marks: PrefillMarks

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Yield the segments of the layer."""
        self.marks.coding[capture.layer] = time.monotonic()
        for segment in self.encoder.encode(capture):
            self.marks.coded[segment.layer] = time.monotonic()
            yield segment


@dataclass(frozen=True)
class WatchedPlan(KvPlan):
    """Make encoders that note when they code.

    Attributes:
        marks: get the moments.
    """

    marks: PrefillMarks = field(default_factory=PrefillMarks)

    @classmethod
    def of(cls, plan: KvPlan, marks: PrefillMarks) -> "WatchedPlan":
        """Return the same plan, watched."""
        values: dict[str, Any] = {one.name: getattr(plan, one.name) for one in fields(plan)}
        return cls(**values, marks=marks)

    def encoder(self, geometry: KvGeometry, tokens: int, framing_bytes: int) -> KvEncoder:
        """Return what codes a prompt's layers; see `KvPlan.encoder`."""
        return WatchedEncoder(super().encoder(geometry, tokens, framing_bytes), self.marks)


class WatchedPipeline(KvPipeline):
    """Make the messages of a Decode stream, and note when; see `KvPipeline`.

    Args:
        marks: get the moments.
        clock: of the device that the model runs on.
        arguments: of `KvPipeline`, with a `WatchedPlan`.
    """

    def __init__(self, marks: PrefillMarks, clock: DeviceClock, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._marks = marks
        self._clock = clock

    def put_layer(self, capture: LayerCapture) -> None:
        """Take a layer from the model; of a prompt in chunks, the last chunk's moment stays."""
        self._marks.computed[capture.layer] = self._clock.mark()
        super().put_layer(capture)

    def messages(self) -> Iterator[Request]:
        """Yield the messages as gRPC asks for them."""
        for message in super().messages():
            if isinstance(message, KvChunk):
                self._marks.handed_over[message.sequence] = time.monotonic()
            yield message
