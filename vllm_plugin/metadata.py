"""What crosses from vLLM's scheduler process to its workers with each step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from spectrumkv.vllm_plugin.scheduler.steps import ConsumerStep, ProducerStep
from spectrumkv.vllm_plugin.stats import Counts


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What workers do in a step.

    Attributes:
        producer: prompts to hand out.
        consumer: KV to fetch.
        counts: of the scheduler's side, which workers report with their own.
    """

    producer: ProducerStep
    consumer: ConsumerStep
    counts: Counts = field(default_factory=dict)
