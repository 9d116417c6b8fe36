"""Watch decode's half of a hand-off, in a process of its own: `receiving_process` starts it, and it runs `main`."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.device.timeline.clock import DeviceClock, Mark
from spectrumkv.bench.transfer.kv import ReceivingServicer
from spectrumkv.common.concurrency.prefetch_iterator import PrefetchIterator
from spectrumkv.common.concurrency.threads import use_one_thread
from spectrumkv.common.errors import DataLossError, UnavailableError
from spectrumkv.common.kv.codecs.base import SegmentDecoder, codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, add_decode_servicer
from spectrumkv.common.rpc.decode_protocol import expect_begin, expect_end
from spectrumkv.common.rpc.decode_stream import ArrivedRequest, Request, serialized_bytes
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.receiver import MESSAGES_AHEAD, KvReceiver
from spectrumkv.v1 import decode_pb2

HOST = "127.0.0.1"


@dataclass(frozen=True)
class LayerArrival:
    """Say when a layer's last segment came to the decode side, in seconds of `time.monotonic`.

    Attributes:
        layer: from 0.
        sequence: of the chunk with the segment.
        arrived: gRPC has handed the chunk over.
        accepted: the chunk is verified, and the segment's decoding begins.
        joined: the segment's keys and values are in the slots.
    """

    layer: int
    sequence: int
    arrived: float
    accepted: float
    joined: float


@dataclass
class WatchedDecoder:
    """Decode as another decoder does, and note when; see `SegmentDecoder`.

    Attributes:
        decoder: decodes.
        clock: of the device that has the slots.
        chunk: sequence number and arrival of the chunk that is being accepted.
        layers: sequence, arrival, acceptance and joining of each layer's newest segment.
    """

    decoder: SegmentDecoder
    clock: DeviceClock
    chunk: tuple[int, float] = (0, 0.0)
    layers: dict[int, tuple[int, float, float, Mark]] = field(default_factory=dict)

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        """Return how many bytes each tier took, after writing the segment's tokens."""
        accepted = time.monotonic()
        tier_bytes = self.decoder.decode(segment, keys, values)
        self.layers[segment.layer] = (*self.chunk, accepted, self.clock.mark())
        return tier_bytes

    @property
    def arrivals(self) -> list[LayerArrival]:
        """Return the moments of all layers."""
        return [
            LayerArrival(layer, sequence, arrived, accepted, self.clock.seconds(joined))
            for layer, (sequence, arrived, accepted, joined) in sorted(self.layers.items())
        ]


class WatchingServicer(ReceivingServicer):
    """Receive KV as the decode service does, and write a line with the `LayerArrival` of all layers to stdout.

    Args:
        pool: the pool that receives the KV.
        metrics: counts every byte, as in the service.
    """

    def __init__(self, pool: KvPool, metrics: Metrics) -> None:
        super().__init__(pool, metrics)
        self._device = pool.keys.device
        self._clock = DeviceClock(self._device)

    def Decode(  # noqa: N802  # gRPC's spelling
        self, requests: Iterator[ArrivedRequest], context: grpc.ServicerContext
    ) -> Iterator[decode_pb2.DecodeResponse]:
        """Receive the KV of one request; see `ReceivingServicer.Decode`.

        Yields:
            Admitted when the slots are reserved, and Finished when all KV is verified and in the pool.
        """
        with _arriving(requests, self._device) as arriving:
            begin = expect_begin(message for message, _ in arriving).begin
            codec = codecs.get(begin.codec.name)
            basis = self._bases.get(begin.codec.basis_digest) if codec.needs_basis else None
            decoder = WatchedDecoder(codec.decoder(self._pool.geometry, basis), self._clock)
            tokens = len(begin.prompt_token_ids)
            self._clock.anchor()
            with self._pool.reserve(tokens) as allocation:
                yield decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=allocation.capacity))
                with KvReceiver(self._pool, allocation, decoder, tokens, self._metrics) as receiver:
                    for message, arrived in arriving:
                        if isinstance(message, KvChunk):
                            decoder.chunk = (message.sequence, arrived)
                            receiver.accept(message, serialized_bytes(message))
                            continue
                        receiver.finish(expect_end(message))
                        yield decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished())
            _write_line([asdict(one) for one in decoder.arrivals])


@contextmanager
def _arriving(requests: Iterator[ArrivedRequest], device: torch.device) -> Iterator[Iterator[tuple[Request, float]]]:
    """Yield the messages with the time of their arrival; on a GPU they are read ahead, as the service does."""
    if device.type == "cpu":
        yield _noted(requests)
        return
    ahead = PrefetchIterator(_noted(requests), MESSAGES_AHEAD, "kv-arrival")
    try:
        yield iter(ahead)
    finally:
        ahead.close()


def _noted(requests: Iterator[ArrivedRequest]) -> Iterator[tuple[Request, float]]:
    for request in requests:
        if isinstance(request, DataLossError):
            raise request
        yield request, time.monotonic()


def _write_line(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class DecodeSide:
    """Hold the running decode side.

    Attributes:
        port: where it listens on this machine.
        process: writes a line for each hand-off.
    """

    port: int
    process: "subprocess.Popen[str]" = field(repr=False)

    @property
    def address(self) -> str:
        """Return the address for gRPC."""
        return f"{HOST}:{self.port}"

    def arrivals(self) -> list[LayerArrival]:
        """Return the moments of the hand-off that has just ended."""
        return [LayerArrival(**one) for one in _read_line(self.process)]


@contextmanager
def receiving_process(geometry: KvGeometry, tokens: int, device: torch.device) -> Iterator[DecodeSide]:
    """Start the decode side, and end it with the block.

    Args:
        geometry: shape and dtype of the model's cache.
        tokens: of each prompt.
        device: "cpu" or "cuda", where the slots are.

    Yields:
        The running decode side.

    Raises:
        UnavailableError: the process ended before it listened.
    """
    described = {
        "layers": geometry.layers,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "native_dtype": str(geometry.native_dtype).removeprefix("torch."),
        "tokens": tokens,
        "device": device.type,
    }
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", __name__, json.dumps(described)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield DecodeSide(int(_read_line(process)["port"]), process)
    finally:
        # The process ends when its standard input does, so it also ends if this process is killed.
        process.communicate()


def _read_line(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise UnavailableError(f"the decode side ended with status {process.wait()}; its error is on standard error")
    return json.loads(line)


def main() -> None:
    """Receive caches of the shape that the first argument describes, until standard input ends."""
    described: dict[str, Any] = json.loads(sys.argv[1])
    tokens, device = described.pop("tokens"), torch.device(described.pop("device"))
    geometry = KvGeometry(**described | {"native_dtype": getattr(torch, described["native_dtype"])})
    metrics = Metrics(CollectorRegistry())
    use_one_thread()
    memory_bytes = tokens * geometry.layers * geometry.native_bytes_per_token_layer
    servicer = WatchingServicer(KvPool(geometry, memory_bytes, device, metrics), metrics)
    server = Server(add_decode_servicer, servicer, SERVICE_NAME, threads=4, count_ended=lambda code: None)
    port = server.bind(f"{HOST}:0")
    server.start()
    _write_line({"port": port})
    sys.stdin.read()
    server.drain(0, threading.Event())


if __name__ == "__main__":
    main()
