"""Take time lines on the prefill side, in a process of its own: `request.take_timelines` starts it to run `main`."""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from spectrumkv.bench.device.scale import kv_choice
from spectrumkv.bench.device.timeline.clock import DeviceClock
from spectrumkv.bench.device.timeline.decode_side import DecodeSide, receiving_process
from spectrumkv.bench.device.timeline.handoff import Handoff, handoff_row, layer_times
from spectrumkv.bench.device.timeline.prefill_side import PrefillMarks, WatchedPipeline, WatchedPlan
from spectrumkv.bench.device.timeline.request import TimelineRequest
from spectrumkv.bench.models.shaped_model import shaped_model_directory
from spectrumkv.bench.models.synthetic_prompt import REQUEST_ID
from spectrumkv.bench.report.results import describe_model
from spectrumkv.bench.serving.load import Workload
from spectrumkv.client.cli.runner import status_and_message
from spectrumkv.common.concurrency.threads import use_one_thread
from spectrumkv.common.errors import InternalError, SpectrumKVError
from spectrumkv.common.kv.codecs.base import needed_basis
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.decode_methods import begin_basis, open_decode_stream
from spectrumkv.common.rpc.decode_protocol import expect_admitted
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.engine import PrefillEngine
from spectrumkv.prefill_server.transfer.pipeline import FirstToken
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.basis_cache import resolve_basis
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2


class PrefillSide:
    """Hand one prompt's KV over to the decode side, by the classes of the prefill service.

    Args:
        loaded: the model.
        engine: runs it.
        decode: the running decode side.
        channel: to it.
        token_ids: the prompt.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: PrefillEngine,
        decode: DecodeSide,
        channel: grpc.Channel,
        token_ids: Sequence[int],
    ) -> None:
        self._loaded = loaded
        self._engine = engine
        self._decode = decode
        self._open: Any = open_decode_stream(channel)
        self._token_ids = token_ids
        self._clock = DeviceClock(loaded.device)
        self._metrics = Metrics(CollectorRegistry())

    def prefill_alone(self) -> float:
        """Return the seconds that the prompt takes when nobody takes its KV."""
        started = time.monotonic()
        self._engine.submit(self._token_ids, lambda capture: None).result()
        return time.monotonic() - started

    def hand_off(self, plan: KvPlan) -> Handoff:
        """Run the prompt and hand its KV over.

        Args:
            plan: how the KV is scored, tiered and coded.

        Returns:
            The hand-off.

        Raises:
            InternalError: the decode side breaks the protocol.
            SpectrumKVError: the KV cannot be coded, or the decode side refused it.
        """
        marks = PrefillMarks()
        begin = decode_pb2.Begin(request_id=REQUEST_ID, codec=plan.codec_id, prompt_token_ids=self._token_ids)
        pipeline = WatchedPipeline(
            marks,
            self._clock,
            begin=begin,
            plan=WatchedPlan.of(plan, marks),
            geometry=self._loaded.geometry,
            chunk_bytes=PrefillConfig.chunk_bytes,
            metrics=self._metrics,
            device=self._loaded.device,
        )
        call = self._open(pipeline.messages(), timeout=None)
        try:
            # Decode admits a request before prefill computes.
            expect_admitted(call)
            self._clock.anchor()
            started = time.monotonic()
            future = self._engine.submit(self._token_ids, pipeline.put_layer, plan.streams_chunks)
            logits = future.result().logits
            prefilled = time.monotonic()
            pipeline.put_first_tokens(FirstToken(int(logits.argmax()), finished=False))
            if len(list(call)) != 1:
                raise InternalError("the decode side did not answer End with Finished alone")
        except grpc.RpcError as error:
            raise pipeline.failure or error_from_rpc(error) from error
        finally:
            pipeline.cancel()
            pipeline.wait_until_idle()
            call.cancel()
        layers = layer_times(marks, self._clock, self._decode.arrivals(), started)
        return Handoff(layers, prefilled - started, pipeline.sent.message_bytes)


def measure(request: TimelineRequest) -> dict[str, Any]:
    """Hand a prompt over by every contender in turn, in every round; one round before them warms up.

    Returns:
        The description of the "model", and "rows", one for each contender.

    Raises:
        SpectrumKVError: the model or a contender cannot be used, or the decode side ended.
    """
    loaded = load_model(str(shaped_model_directory(request.shape)), request.device, "auto")
    token_ids = Workload.random(1, request.tokens, 1, None, None, loaded.spec.vocab_size, seed=0).prompts[0]
    with PrefillEngine(loaded, PrefillConfig.window) as engine:
        basis = resolve_basis(loaded, lambda done: None)
        plans = {name: _plan(name, loaded, basis) for name in request.contenders}
        use_one_thread()
        with (
            receiving_process(loaded.geometry, request.tokens, loaded.device) as decode,
            open_channel(decode.address) as channel,
        ):
            for plan in plans.values():
                if plan.codec.needs_basis:
                    begin_basis(channel, needed_basis(plan.codec, plan.basis), timeout=None)[0].result()
            side = PrefillSide(loaded, engine, decode, channel, token_ids)
            alone: list[float] = []
            handoffs: dict[str, list[Handoff]] = {name: [] for name in plans}
            for _ in range(request.rounds + 1):
                alone.append(side.prefill_alone())
                for name, plan in plans.items():
                    handoffs[name].append(side.hand_off(plan))
    fp16_bytes = loaded.geometry.fp16_bytes(request.tokens)
    prefill_alone_ms = 1e3 * statistics.median(alone[1:])
    rows = [
        _columns(name, plans[name], request.tokens)
        | {"prefill_alone_ms": prefill_alone_ms}
        | handoff_row(handoffs[name][1:], fp16_bytes)
        for name in plans
    ]
    return {"model": describe_model(loaded), "rows": rows}


def _plan(contender: str, loaded: LoadedModel, basis: Basis) -> KvPlan:
    """Return how the prefill service would send KV that is asked for so, with INT4 allowed in all layers."""
    options = kv_choice(contender).to_proto()
    verdict = ProbeVerdict.from_flag("on", loaded.geometry.layers)
    return KvPlan.resolve(options, build(PrefillConfig, {}), verdict, seed=0, basis=basis)


def _columns(contender: str, plan: KvPlan, tokens: int) -> dict[str, Any]:
    return {
        "contender": contender,
        "policy": plan.policy.name,
        "codec": plan.codec.name,
        "budget_target": plan.budget.value,
        "prompt_tokens": tokens,
    }


def main() -> None:
    """Read a `TimelineRequest` from the first argument; write the time lines to standard output."""
    try:
        result = measure(TimelineRequest.from_json(sys.argv[1]))
    except SpectrumKVError as error:
        sys.exit(status_and_message(error))
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
