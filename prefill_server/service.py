"""The gRPC service of prefill, and the main flow of the product."""

import concurrent.futures
import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc

from spectrumkv.common.errors import CancelledError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernel_fault, kernels_code
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.request_log import current_request
from spectrumkv.prefill_server.engine import PrefillEngine, PromptResult
from spectrumkv.prefill_server.first_token import sample_first
from spectrumkv.prefill_server.model_check import ModelCheck
from spectrumkv.prefill_server.progress import Progress, RequestsInService
from spectrumkv.prefill_server.prompt_tokens import PromptLogprobs, prompt_messages
from spectrumkv.prefill_server.reading import RequestReader
from spectrumkv.prefill_server.request import PrefillRequest
from spectrumkv.prefill_server.server_info import server_info
from spectrumkv.prefill_server.transfer import CodecSelector, FirstToken, KvPipeline, KvPlan
from spectrumkv.prefill_server.transfer.kv_memory import KvMemory, KvReservation, kv_memory_bytes
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.prefill_server.workers import DecodeLease, Dispatch, WorkerPool
from spectrumkv.v1 import decode_pb2, prefill_pb2, prefill_pb2_grpc


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """Runs prompts, sends their KV to decode workers and relays what they generate.

    Args:
        loaded: the model.
        config: the service's options.
        metrics: the process's metrics.
        engine: runs the prompts.
        verdict: how strongly KV may be coded where a request leaves that open.
        basis: of the model, for codecs that need one; None where there is none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: PrefillConfig,
        metrics: Metrics,
        engine: PrefillEngine,
        verdict: ProbeVerdict,
        basis: Basis | None,
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._metrics = metrics
        self._engine = engine
        self._verdict = verdict
        self._basis = basis
        self._codec_selector = CodecSelector(
            loaded.geometry, on_gpu=loaded.device.type == "cuda", kernels_code=kernels_code(loaded.device)
        )
        self._workers = WorkerPool(
            config.decode,
            ChannelSecurity.to_decode(config),
            metrics,
            basis,
            config.resolve_interval,
            self._codec_selector.forget,
        )
        self._requests = RequestsInService()
        self._model_check = ModelCheck(loaded, engine)
        self._reader = RequestReader(loaded, config, verdict, basis, engine.vitals)
        # A default that no request could use should be found out at start-up.
        KvPlan.resolve(prefill_pb2.KvOptions(), config, verdict, seed=0, basis=basis)
        metrics.kernel_faults.set(bool(kernel_fault()))
        metrics.int4_probe_passed.set(verdict.int4_allowed)
        metrics.probe_safe_budget.set(verdict.safe_budget or 0)
        self._kv_bytes_per_token = loaded.geometry.layers * loaded.geometry.native_bytes_per_token_layer
        self._kv_memory = KvMemory(kv_memory_bytes(config.prefill_kv_memory, loaded.device))
        metrics.requests_waiting.set_function(lambda: self._waiting)
        metrics.requests_running.set_function(lambda: self._running)

    @property
    def most_message_bytes(self) -> int:
        """The most bytes of a message that a client may send."""
        return self._reader.most_message_bytes

    def Generate(  # noqa: N802  # gRPC's spelling
        self, message: prefill_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[prefill_pb2.GenerateResponse]:
        """Serve one request: reserve slots on decode, run the prompt while its KV leaves, then relay tokens.

        Yields:
            Each token as it comes, then Finished.

        Raises:
            SpectrumKVError: the request is at fault, no decode worker can serve it, or its caller ended it.
        """
        progress = Progress(arrived_at=time.monotonic())
        current_request().at_end(progress.log_fields)
        with (
            RpcScope(context, self._config.deadline, self._config.max_deadline) as scope,
            self._engine.vitals.leaving_after(scope.on_end),
            self._requests.counted(),
            self._model_check.after_failure(),
            ExitStack() as at_end,
        ):
            request = self._reader.read(message, progress, scope)
            at_end.callback(self._count_stages, request)
            memory = self._kv_memory.reservation(len(request.token_ids), self._kv_bytes_per_token, scope)
            at_end.enter_context(memory)
            for dispatch in self._offered(request, memory, scope):
                pipeline = self._pipeline(request, dispatch, memory)
                with dispatch, dispatch.open_lease(pipeline) as lease:
                    logprobs = request.new_prompt_logprobs()
                    result = self._run_prompt(request, lease, scope, logprobs)
                    yield from self._prompt_tokens(request, logprobs)
                    yield from self._first_tokens(request, lease, result)
                    yield from self._relay_tokens(request, lease, dispatch)
            yield self._finished(request, lease, result)

    def GetServerInfo(  # noqa: N802  # gRPC's spelling
        self, request: prefill_pb2.PrefillServiceGetServerInfoRequest, context: grpc.ServicerContext
    ) -> prefill_pb2.PrefillServiceGetServerInfoResponse:
        """Return what is served, the defaults, and what a request may ask for."""
        info = server_info(self._loaded, self._config, self._verdict, self._workers)
        info.requests_waiting, info.requests_running = self._waiting, self._running
        return info

    def Tokenize(  # noqa: N802  # gRPC's spelling
        self, request: prefill_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> prefill_pb2.TokenizeResponse:
        """Return the token ids that Generate would run for a request."""
        with (
            RpcScope(context, self._config.deadline, self._config.max_deadline) as scope,
            self._engine.vitals.leaving_after(scope.on_end),
        ):
            token_ids = self._reader.tokenize(request.request, scope)
        return prefill_pb2.TokenizeResponse(token_ids=token_ids, context_length=self._loaded.context_length)

    def Detokenize(  # noqa: N802  # gRPC's spelling
        self, request: prefill_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> prefill_pb2.DetokenizeResponse:
        """Return the text of token ids."""
        return self._reader.detokenize(request)

    def start(self) -> None:
        """Begin to follow the decode workers; call this before the server takes requests."""
        self._workers.start()

    def stop(self) -> None:
        """End the engine and close the channels to decode workers; call this after the server has drained."""
        self._reader.stop()
        self._engine.stop()
        self._workers.close()

    @property
    def _waiting(self) -> int:
        """How many requests wait for the model, or for memory."""
        return self._engine.waiting + self._kv_memory.waiting

    @property
    def _running(self) -> int:
        """How many requests there are beside those that wait."""
        return max(0, self._requests.count - self._waiting)

    def _count_stages(self, request: PrefillRequest) -> None:
        """Count the request once in each stage that it came through, however many workers it went to."""
        for stage, seconds in request.stage_seconds.items():
            self._metrics.request_duration.labels(stage).observe(seconds)

    def _offered(self, request: PrefillRequest, memory: KvReservation, scope: RpcScope) -> Iterator[Dispatch]:
        """Yield decode workers, one after another, until one serves the request.

        Whoever waits for memory holds no slots: a worker is chosen once the prompt's KV has room on prefill.
        """
        may_fall_back = self._codec_selector.basis_free(request.plan) is not None
        request.add_to_stage("queue", memory.wait())
        for dispatch in self._workers.offer(request.slots, scope, request.plan.codec.needs_basis, may_fall_back):
            # Again where a worker was lost to which all of the KV had left.
            request.add_to_stage("queue", memory.wait())
            yield dispatch

    def _pipeline(self, request: PrefillRequest, dispatch: Dispatch, memory: KvReservation) -> KvPipeline:
        """Return a fresh pipeline that sends the request's KV to one worker."""
        worker = str(dispatch.worker.address)
        plan = self._codec_selector.select(request.plan, len(request.token_ids), worker, dispatch.lacks_basis)
        begin = decode_pb2.Begin(
            request_id=request.request_id,
            model=self._loaded.spec.to_proto(),
            codec=plan.codec_id,
            prompt_token_ids=request.token_ids,
            sampling=request.params.to_proto(),
        )
        return KvPipeline(
            begin,
            plan,
            self._loaded.geometry,
            self._config.chunk_bytes,
            self._metrics,
            self._loaded.device,
            memory,
            self._engine.vitals,
            request.new_kv_map(plan, self._loaded.geometry),
        )

    def _run_prompt(
        self, request: PrefillRequest, lease: DecodeLease, scope: RpcScope, logprobs: PromptLogprobs | None
    ) -> PromptResult:
        """Run the prompt while its KV leaves layer by layer.

        Returns:
            The logits of the first token, and what the prompt took.

        Raises:
            SpectrumKVError: the KV cannot be coded, the worker was lost, or the request ended.
        """
        pipeline, record = lease.pipeline, current_request()
        record.note(decode_worker=str(lease.worker))
        record.at_end(pipeline.sent.log_fields)
        record.begin_stage("queue")
        logits_hook = None if logprobs is None else logprobs.put
        streams_chunks = pipeline.plan.streams_chunks
        future = self._engine.submit(request.token_ids, pipeline.put_layer, streams_chunks, logits_hook)
        scope.on_end(future.cancel)
        lease.on_end(future.cancel)
        try:
            result = future.result()
        except (CancelledError, concurrent.futures.CancelledError):
            scope.check()
            raise lease.failure() or CancelledError("the request ended while its prompt was computed") from None
        record.begin_stage("prefill", time.monotonic() - result.compute_seconds)
        record.begin_stage("hand-off")
        request.add_to_stage("queue", result.queue_seconds)
        request.add_to_stage("prefill", result.compute_seconds)
        record.note(**{f"{stage}_seconds": seconds for stage, seconds in request.stage_seconds.items()})
        return result

    def _prompt_tokens(
        self, request: PrefillRequest, logprobs: PromptLogprobs | None
    ) -> Iterator[prefill_pb2.GenerateResponse]:
        """Yield the prompt's tokens where the client asks for them, unless it has them from an earlier dispatch."""
        if (request.echo or logprobs is not None) and request.progress.completion_tokens == 0:
            for tokens in prompt_messages(self._loaded, request.token_ids, logprobs):
                yield prefill_pb2.GenerateResponse(prompt_tokens=tokens)

    def _first_tokens(
        self, request: PrefillRequest, lease: DecodeLease, result: PromptResult
    ) -> Iterator[prefill_pb2.GenerateResponse]:
        """Hand the first token of each answer to decode and to the client.

        Yields:
            The tokens, unless the client has them from an earlier dispatch.
        """
        if not request.first:
            request.first = sample_first(self._loaded, request.params, request.token_ids, result.logits)
            request.finish = request.first[0].finish_reason
        first = (FirstToken(one.token_id, finished=bool(one.finish_reason)) for one in request.first)
        lease.pipeline.put_first_tokens(*first)
        if request.progress.completion_tokens == 0:
            for token in request.first:
                yield prefill_pb2.GenerateResponse(token=token)
                request.progress.first_token_left(self._metrics)

    def _relay_tokens(
        self, request: PrefillRequest, lease: DecodeLease, dispatch: Dispatch
    ) -> Iterator[prefill_pb2.GenerateResponse]:
        """Relay what decode generates, and take in how the first answer ended.

        Yields:
            Each answer's tokens after its first.
        """
        for message in lease.responses():
            dispatch.commit()
            if message.HasField("token"):
                if message.token.answer == 0:
                    request.finish = message.token.finish_reason
                yield prefill_pb2.GenerateResponse(token=message.token)
                request.progress.token_left(self._metrics)
            else:
                request.progress.recomputed_prompt_tokens = message.finished.recomputed_prompt_tokens

    def _finished(
        self, request: PrefillRequest, lease: DecodeLease, result: PromptResult
    ) -> prefill_pb2.GenerateResponse:
        """Return the message that ends the request, and learn from what the request took."""
        sent, plan, kv_map = lease.pipeline.sent, lease.pipeline.plan, lease.pipeline.kv_map
        tokens, worker = len(request.token_ids), str(lease.worker)
        usage = request.usage(plan, sent, self._loaded.geometry, worker)
        self._codec_selector.observe(plan, tokens, worker, result.compute_seconds, sent)
        self._metrics.request_duration.labels("encode").observe(sent.encode_seconds)
        self._metrics.request_duration.labels("transfer").observe(sent.transfer_seconds)
        self._metrics.kv_codec.labels(plan.codec.name).inc()
        current_request().note(budget_counted=usage.budget_counted, codec=plan.codec.name)
        if plan.codec_reason:
            current_request().note(codec_reason=plan.codec_reason)
        shown = None if kv_map is None else kv_map.to_proto()
        finished = prefill_pb2.GenerateFinished(finish_reason=request.finish, usage=usage, kv_map=shown)
        return prefill_pb2.GenerateResponse(finished=finished)
