"""What prefill makes of a decode worker that holds a request up."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import add_decode_servicer, open_decode_stream
from spectrumkv.common.rpc.limits.stalled_readers import StalledReaders
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.workers import lease
from spectrumkv.prefill_server.workers.lease import open_lease
from spectrumkv.prefill_server.workers.token_pace import TokenPace
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS

# Together more than the windows of a connection take.
CHUNKS, CHUNK_BYTES = 64, 1 << 20


class LongPrompt:
    """The pipeline of a request with much KV."""

    failure = None
    first_tokens = ()
    vocab_size = 1

    def __init__(self) -> None:
        self.sent = 0
        self.cancelled = threading.Event()

    def messages(self) -> Iterator[decode_pb2.DecodeRequest | KvChunk]:
        yield decode_pb2.DecodeRequest(begin=decode_pb2.Begin())
        for number in range(CHUNKS):
            yield KvChunk(number, 0, (bytes(CHUNK_BYTES),))
            self.sent += 1

    def cancel(self) -> None:
        self.cancelled.set()

    def wait_until_idle(self) -> None:
        pass


class Patient:
    """The scope of a client who waits."""

    seconds_remaining = WAIT_SECONDS

    def on_end(self, callback: Callable[[], object]) -> None:
        pass

    def check(self) -> None:
        pass


def test_a_worker_that_takes_no_kv_is_given_up_long_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has admitted the request and answers pings; memory on prefill is held until its KV has left."""
    monkeypatch.setattr(lease, "_links", StalledReaders(0.5))
    over = threading.Event()

    class AdmitsAndReadsNoFurther(decode_pb2_grpc.DecodeServiceServicer):
        def Decode(self, requests: Any, context: Any) -> Iterator[decode_pb2.DecodeResponse]:  # noqa: N802
            yield decode_pb2.DecodeResponse(admitted=decode_pb2.Admitted(slots=1))
            over.wait(WAIT_SECONDS)

    pipeline, server = LongPrompt(), grpc.server(ThreadPoolExecutor(2))
    add_decode_servicer(AdmitsAndReadsNoFurther(), server)
    address = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
    server.start()
    with open_channel(str(address)) as channel:
        stream = open_decode_stream(channel)
        metrics = Metrics(CollectorRegistry())
        held = open_lease(address, stream, cast(Any, pipeline), cast(Any, Patient()), metrics, TokenPace())
        with held:
            held.wait_for_admission()
            with pytest.raises(UnavailableError, match=f"decode worker {address}: it took no KV for 60 s"):
                next(held.responses())
            assert held.worker_error is not None
        assert pipeline.cancelled.wait(WAIT_SECONDS)
        over.set()
    server.stop(0).wait()
    assert 0 < pipeline.sent < CHUNKS
