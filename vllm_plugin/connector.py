"""The connector as vLLM sees it: hands each of vLLM's calls to the half that answers it."""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.v1.request import RequestStatus

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.vllm_plugin.engine_stats import EngineMetrics, EngineStats
from spectrumkv.vllm_plugin.metadata import StepMetadata
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.scheduler.consumer import ConsumerSchedule
from spectrumkv.vllm_plugin.scheduler.producer import ProducerSchedule
from spectrumkv.vllm_plugin.stats import Tally

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from spectrumkv.vllm_plugin.decode.worker import ConsumerWorker
    from spectrumkv.vllm_plugin.worker import Producer

DELIVERED = (RequestStatus.FINISHED_LENGTH_CAPPED,)


# vLLM is not installed where types are checked.
class SpectrumKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Carries the KV of prompts from one vLLM to another, at a byte budget."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = self._kv_transfer_config
        self._options = ConnectorOptions.of(config.kv_connector_extra_config)
        _check_engine(vllm_config, kv_cache_config)
        self._block_tokens = vllm_config.cache_config.block_size
        self._tally = Tally.empty()
        self._producing, self._consuming = config.is_kv_producer, config.is_kv_consumer
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if self._producing and self._options.listen.port == 0:
            raise InvalidArgumentError("listen of kv_connector_extra_config has port 0; name the port for consumers")
        self._prompts = ProducerSchedule(
            self._options.host, self._options.listen.port, ranks, self._options.policy, self._options.budget
        )
        self._loads = ConsumerSchedule()
        self._producer: Producer | None = None
        self._consumer: ConsumerWorker | None = None

    # The scheduler's side.

    def on_new_request(self, request: "Request") -> None:
        """Take in a request; one whose KV will not be exact gets a prefix cache of its own."""
        if self._producing:
            self._prompts.arrived(request)
        if self._consuming and (salt := self._loads.arrived(request)):
            request.cache_salt = " ".join(filter(None, (request.cache_salt, salt)))
            request.block_hashes.clear()
            request.update_block_hashes()

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens can be loaded, and that they are loaded between steps."""
        matched = self._loads.matched_tokens(request, num_computed_tokens)
        return matched, matched > 0

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Take in the pages of a request."""
        self._loads.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """Return what workers do in this step."""
        for schedule in (self._prompts, self._loads):
            for reason, number in schedule.rejects.take().items():
                self._tally.add("kv_requests_rejected_total", reason, number)
        return StepMetadata(self._prompts.step(scheduler_output), self._loads.step(), self._tally.take())

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Take in which loads ended."""
        self._loads.reported(connector_output.finished_recving or ())

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Return that the pages may be freed, and where the KV is."""
        self._loads.finished(request)
        return False, self._prompts.finished(request, request.status in DELIVERED)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return what `request_finished` does: there is one group of layers."""
        return self.request_finished(request, block_ids[0])

    @property
    def requires_kv_delivery(self) -> bool:
        """Return False: what is handed out was copied in the step that computed it."""
        return False

    # The worker's side.

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """Find the model's layers, and start this worker's halves."""
        from spectrumkv.vllm_plugin import worker
        from spectrumkv.vllm_plugin.layers import engine_layers

        modules = self._vllm_config.compilation_config.static_forward_context
        layers = engine_layers(kv_caches, modules)
        model = worker.EngineModel.of(
            self._vllm_config.model_config.model,
            layers,
            get_tensor_model_parallel_rank(),
            self._vllm_config.parallel_config.tensor_parallel_size,
            self._block_tokens,
        )
        if self._producing and model.hands_out:
            self._producer = worker.start_producer(model, self._options, self._tally)
            for one in layers:
                self._tap(one.name, modules[one.name].impl)
        if self._consuming:
            self._consumer = worker.consumer_worker(model, self._options, self._tally)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take in what this step does."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        for metric, labels in connector_metadata.counts.items():
            for label, number in labels.items():
                self._tally.add(metric, label, number)
        if self._producer is not None:
            self._producer.worker.begin_step(connector_metadata.producer)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the loads of this step; vLLM calls this after the forward pass."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        if self._consumer is not None:
            self._consumer.begin_step(metadata.consumer)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads end between steps."""

    def save_kv_layer(self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: Any, **kwargs: Any) -> None:
        """Copy a layer of the prompts that this step completes."""
        if self._producer is not None:
            self._producer.worker.save(layer_name)

    def wait_for_save(self) -> None:
        """End the step; what is coded was copied."""
        if self._producer is not None:
            self._producer.worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the loads that ended, each once."""
        if self._consumer is None:
            return KVConnectorTransferResults()
        ended = self._consumer.take_ended()
        return KVConnectorTransferResults(finished_recving=ended.ended, failed_recving=ended.failed)

    def shutdown(self) -> None:
        """End this worker's halves."""
        if self._producer is not None:
            self._producer.stop()
        if self._consumer is not None:
            self._consumer.stop()

    def get_kv_connector_stats(self) -> EngineStats | None:
        """Return what was counted since the last call."""
        if self._producer is not None:
            self._tally.set_level("kv_outbox_bytes", self._producer.outbox.used_bytes)
        counts = self._tally.take()
        return EngineStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> EngineStats:
        """Return counts that crossed from a worker."""
        return EngineStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> EngineMetrics:
        """Return what shows the counts to Prometheus."""
        return EngineMetrics(*arguments)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Return True: a graph of a whole pass would run no hook of a layer."""
        return True

    def _tap(self, name: str, implementation: Any) -> None:
        """Show the producer the queries of a layer; vLLM looks `forward` up at each call."""
        forward = implementation.forward

        def tapped(layer: Any, query: "torch.Tensor", *arguments: Any, **named: Any) -> Any:
            if self._producer is not None and self.has_connector_metadata():
                slots = get_forward_context().slot_mapping
                if isinstance(slots, dict) and name in slots:
                    self._producer.worker.tap(name, query, slots[name])
            return forward(layer, query, *arguments, **named)

        implementation.forward = tapped


def _check_engine(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """Refuse engines whose KV the connector cannot carry.

    Raises:
        FailedPreconditionError: it is one of these; the message names the option.
    """
    parallel = vllm_config.parallel_config
    obstacles = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "several KV cache groups": len(kv_cache_config.kv_cache_groups) > 1,
        "a quantized KV cache (--kv-cache-dtype)": vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16"),
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        raise FailedPreconditionError(f"SpectrumKVConnector does not work with {', '.join(found)}; turn it off")
