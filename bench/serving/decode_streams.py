"""Open Decode streams with recorded requests: streams that generate, and KV that arrives beside them."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.models.synthetic_prompt import REQUEST_ID, SyntheticCache, layer_captures
from spectrumkv.common.errors import DataLossError, InternalError, SpectrumKVError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.rpc.decode_methods import open_decode_stream
from spectrumkv.common.rpc.decode_stream import ArrivedResponse, Request, serialized_bytes
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import decode_pb2, kv_pb2

# The recorded prompts consist of this token, which is also their first token.
FIRST_TOKEN = 1
Interval = tuple[float, float]


@dataclass(frozen=True)
class Recording:
    """Hold the requests of a Decode stream, which can be sent repeatedly.

    Attributes:
        begin: the message that opens the stream.
        rest: the chunks, then End.
        budget_counted: bytes of all messages ÷ FP16 bytes of the KV.
    """

    begin: Request
    rest: tuple[Request, ...]
    budget_counted: float


@torch.inference_mode()
def record(
    spec: kv_pb2.ModelSpec, cache: SyntheticCache, plan: KvPlan, window: int, chunk_bytes: int, max_tokens: int | None
) -> Recording:
    """Return a recording of what prefill would send for a prompt with this KV.

    Args:
        spec: spec of the decode service's model, whose geometry the cache has.
        cache: keys and values of the prompt.
        plan: how they are scored, tiered and encoded.
        window: queries that scorers observe; a shorter prompt has fewer.
        chunk_bytes: payload of a chunk, in bytes.
        max_tokens: tokens to generate, the first included; None ends the request with its first token.
    """
    params = SamplingParams(max_tokens=max_tokens or 1, ignore_eos=True, seed=0)
    begin = decode_pb2.Begin(
        request_id=REQUEST_ID,
        model=spec,
        codec=plan.codec_id,
        prompt_token_ids=[FIRST_TOKEN] * cache.tokens,
        sampling=params.to_proto(),
    )
    pipeline = KvPipeline(begin, plan, cache.geometry, chunk_bytes, Metrics(CollectorRegistry()))
    for capture in layer_captures(cache, cache.geometry.kv_heads, min(window, cache.tokens)):
        pipeline.put_layer(capture)
    pipeline.put_first_tokens(FirstToken(FIRST_TOKEN, finished=max_tokens is None))
    messages = tuple(pipeline.messages())
    counted = sum(map(serialized_bytes, messages)) / cache.geometry.fp16_bytes(cache.tokens)
    return Recording(messages[0], messages[1:], counted)


@dataclass
class RunningStreams:
    """Hold streams that generate, and the times at which their tokens arrived.

    Attributes:
        arrived: ascending times (`time.monotonic`) of each stream's tokens.
    """

    arrived: list[list[float]]
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _failure: SpectrumKVError | None = None

    def follow(self, stream: int, responses: Iterator[ArrivedResponse]) -> None:
        """Note the time of each token of a stream until the stream ends."""
        try:
            for response in responses:
                if isinstance(response, DataLossError):
                    raise response
                if response.WhichOneof("message") == "token":
                    with self._changed:
                        self.arrived[stream].append(time.monotonic())
                        self._changed.notify_all()
            self._end(InternalError("a stream ended before the measurement did"))
        except grpc.RpcError as error:
            self._end(error_from_rpc(error))
        except SpectrumKVError as error:
            self._end(error)

    def wait_for_tokens(self, more: int) -> None:
        """Wait until every stream has generated this many more tokens.

        Raises:
            SpectrumKVError: a stream ended.
        """
        with self._changed:
            goals = [len(times) + more for times in self.arrived]
            self._changed.wait_for(
                lambda: self._failure or all(len(a) >= goal for a, goal in zip(self.arrived, goals, strict=True))
            )
            if self._failure is not None:
                raise self._failure

    def gaps(self) -> list[Interval]:
        """Return the begin and end of each gap between two tokens of a stream."""
        return [gap for times in self.arrived for gap in itertools.pairwise(times)]

    def _end(self, why: SpectrumKVError) -> None:
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()


@contextmanager
def running_streams(channel: grpc.Channel, recording: Recording, count: int) -> Iterator[RunningStreams]:
    """Run streams that generate during the block.

    Args:
        channel: the connection to a decode service.
        recording: what each stream sends.
        count: number of streams.

    Yields:
        The streams.
    """
    streams, open_stream = RunningStreams([[] for _ in range(count)]), open_decode_stream(channel)
    calls = [open_stream(iter((recording.begin, *recording.rest)), timeout=None) for _ in range(count)]
    followers = [
        threading.Thread(target=streams.follow, args=(number, call), daemon=True) for number, call in enumerate(calls)
    ]
    try:
        for follower in followers:
            follower.start()
        yield streams
    finally:
        for call in calls:
            call.cancel()
        for follower in followers:
            follower.join()


def arrive(channel: grpc.Channel, recording: Recording) -> Interval:
    """Send a recording that ends with its first token; return when sending began and when decode had verified all KV.

    Returns:
        Both times, by `time.monotonic`.

    Raises:
        InternalError: decode generated although the request had ended.
        SpectrumKVError: decode refused the request.
    """  # noqa: DOC501  # the rule wants `error_from_rpc` itself; it makes a SpectrumKVError
    admitted = threading.Event()

    def requests() -> Iterator[Request]:
        yield recording.begin
        admitted.wait()
        yield from recording.rest

    call = open_decode_stream(channel)(requests(), timeout=None)
    try:
        next(call)
        started = time.monotonic()
        admitted.set()
        for _ in call:
            raise InternalError("decode answered a request that ended with its first token")
        return started, time.monotonic()
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    finally:
        admitted.set()
        call.cancel()
