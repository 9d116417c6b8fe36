"""Codes the layers of prompts on a thread of its own, beside vLLM's, and puts the messages into the outbox."""

import logging
import queue
import threading
from dataclasses import dataclass, replace

import torch

from spectrumkv.common.concurrency.cuda_stream import KvStream, record_event
from spectrumkv.common.errors import InternalError, SpectrumKVError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import KvEncoder
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.common.kv.plan import CodingPlan
from spectrumkv.common.kv.wire import ChunkWriter, KvChunk
from spectrumkv.common.rpc.decode_stream import CHECKSUM_BYTES, serialize_request
from spectrumkv.v1 import kv_pb2, transfer_pb2
from spectrumkv.vllm_plugin.prefill.outbox import Outbox
from spectrumkv.vllm_plugin.prefill.plans import Planner
from spectrumkv.vllm_plugin.scheduler.steps import PrefillStep
from spectrumkv.vllm_plugin.stats import Tally

logger = logging.getLogger(__name__)

# Most bytes that a chunk takes besides its payload, and that the header and the end take together.
CHUNK_ENVELOPE_BYTES, HEADER_AND_END_BYTES = 24, 320
# Payload at which a chunk leaves where no layer waits to be coded.
IDLE_CHUNK_BYTES = 64 << 10
# How often transfers that nobody fetches are looked for while nothing is coded.
EXPIRY_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer to code, the first one with what begins the transfer."""

    step: PrefillStep
    capture: LayerCapture
    is_last: bool


@dataclass
class _Coding:
    """A prompt that is being coded."""

    plan: CodingPlan
    encoder: KvEncoder
    writer: ChunkWriter


class Coder:
    """Codes prompts one after another, each layer as soon as it comes.

    Args:
        planner: says how each prompt is coded.
        whole_digest: of the basis of all KV heads, by which consumers ask for it; nothing where there is none.
        geometry: of the KV heads of this rank.
        heads: of this rank.
        outbox: takes the messages.
        chunk_bytes: payload at which a chunk leaves.
        device: where the layers are.
        tally: counts what was coded.
    """

    def __init__(
        self,
        planner: Planner,
        whole_digest: bytes,
        geometry: KvGeometry,
        heads: HeadRange,
        outbox: Outbox,
        chunk_bytes: int,
        device: torch.device,
        tally: Tally,
    ) -> None:
        self._planner, self._whole_digest = planner, whole_digest
        self._geometry, self._heads = geometry, heads
        self._outbox, self._chunk_bytes, self._tally = outbox, chunk_bytes, tally
        self._stream = KvStream(device)
        self._layers: queue.SimpleQueue[_Layer | None] = queue.SimpleQueue()
        self._codings: dict[str, _Coding] = {}
        self._thread = threading.Thread(target=self._run, name="kv-coder", daemon=True)

    def start(self) -> None:
        """Start the thread; call this before layers come."""
        self._thread.start()

    def reserve(self, step: PrefillStep) -> bool:
        """Open a prompt's transfer.

        Args:
            step: that completes the prompt.

        Returns:
            Whether there is memory for it; if not, whoever fetches it is told so.
        """
        fp16 = self._geometry.fp16_bytes(step.prompt_tokens)
        waiting = self._geometry.layers * step.prompt_tokens * self._geometry.native_bytes_per_token_layer
        # A prompt that falls back to its exact form takes as much coded as it takes waiting.
        coded = waiting if step.budget >= 1 else int(step.budget * fp16)
        try:
            self._outbox.open(step.transfer_id, waiting + coded, step.fetches)
        except SpectrumKVError as error:
            self._tally.add("kv_transfers_failed_total", error.code.lower())
            logger.warning("transfer %s: %s", step.transfer_id, error.message)
            return False
        return True

    def put(self, step: PrefillStep, capture: LayerCapture) -> None:
        """Take a layer of a prompt, in the model's order.

        Args:
            step: that completes the prompt.
            capture: the layer; its tensors are the coder's own.
        """
        capture = replace(capture, computed=record_event(capture.keys))
        self._layers.put(_Layer(step, capture, capture.layer == self._geometry.layers - 1))

    def stop(self) -> None:
        """End the thread after the layers that wait."""
        self._layers.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            try:
                layer = self._layers.get(timeout=EXPIRY_SECONDS)
            except queue.Empty:
                # An engine without requests runs no step that could look.
                self._outbox.expire()
                continue
            if layer is None:
                return
            transfer_id = layer.step.transfer_id
            try:
                if self._outbox.holds(transfer_id):
                    self._code(layer)
            except Exception as error:  # whoever fetches the transfer is told, and the thread goes on
                logger.exception("transfer %s could not be coded", transfer_id)
                self._fail(transfer_id, error)
            if layer.is_last or not self._outbox.holds(transfer_id):
                self._codings.pop(transfer_id, None)
            del layer

    def _fail(self, transfer_id: str, error: Exception) -> None:
        known = error if isinstance(error, SpectrumKVError) else InternalError(f"{type(error).__name__}: {error}")
        self._tally.add("kv_transfers_failed_total", known.code.lower())
        self._outbox.fail(transfer_id, known)

    def _code(self, layer: _Layer) -> None:
        transfer_id, capture = layer.step.transfer_id, layer.capture
        if capture.layer == 0:
            self._codings[transfer_id] = self._begin(layer.step, capture)
        coding = self._codings[transfer_id]
        chunks: list[KvChunk] = []
        with self._stream.working(capture.computed, (capture.queries, capture.keys, capture.values)):
            for segment in coding.encoder.encode(capture):
                for tier, size in segment.tier_bytes.items():
                    self._tally.add("kv_bytes_coded_total", tier.label, size)
                chunks += [chunk for chunk, _ in coding.writer.add(segment)]
        if layer.is_last or (self._layers.empty() and coding.writer.pending_bytes >= IDLE_CHUNK_BYTES):
            chunks += [chunk for chunk, _ in coding.writer.flush()]
        for chunk in chunks:
            self._outbox.add(transfer_id, serialize_request(chunk))
        if layer.is_last:
            totals = coding.writer.totals()
            end = transfer_pb2.TransferEnd(
                chunks=totals.chunks, payload_bytes=totals.payload_bytes, digest=totals.digest
            )
            self._outbox.finish(transfer_id, serialize_request(transfer_pb2.FetchResponse(end=end)))
            self._count(coding, layer.step)

    def _begin(self, step: PrefillStep, capture: LayerCapture) -> _Coding:
        """Choose the plan, and put the header into the outbox.

        Returns:
            What codes the prompt.
        """
        tokens = step.prompt_tokens
        target = min(self._chunk_bytes, IDLE_CHUNK_BYTES)
        most_chunks = 1 + int(step.budget * self._geometry.fp16_bytes(tokens)) // target
        framing = HEADER_AND_END_BYTES + most_chunks * CHUNK_ENVELOPE_BYTES + CHECKSUM_BYTES
        plan, reason = self._planner.plan(step.policy, step.budget, tokens, framing)
        if reason:
            logger.warning("transfer %s is exact instead of %s: %s", step.transfer_id, step.policy, reason)
            self._tally.add("kv_fallbacks_total", reason)
        codec = kv_pb2.CodecId(
            name=plan.codec.name,
            version=plan.codec.version,
            basis_digest=self._whole_digest if plan.codec.needs_basis else b"",
        )
        header = transfer_pb2.TransferHeader(
            codec=codec,
            tokens=tokens,
            window=capture.queries.shape[1],
            first_head=self._heads.first,
            end_head=self._heads.end,
            policy=plan.policy.name,
            budget=plan.budget.value,
        )
        self._outbox.add(step.transfer_id, serialize_request(transfer_pb2.FetchResponse(header=header)))
        return _Coding(plan, plan.encoder(self._geometry, tokens, framing), ChunkWriter(self._chunk_bytes))

    def _count(self, coding: _Coding, step: PrefillStep) -> None:
        codec = coding.plan.codec.name
        self._tally.add("kv_tokens_coded_total", codec, step.prompt_tokens)
        self._tally.add("kv_fp16_equivalent_bytes_total", codec, self._geometry.fp16_bytes(step.prompt_tokens))
