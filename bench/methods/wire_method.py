"""Send KV as the services do: by a plan, in the messages that prefill would send, into the receiver of decode."""

from dataclasses import dataclass

import torch

from spectrumkv.bench.methods.method import Prompt, SentBytes, mean_tier_cost
from spectrumkv.bench.models.synthetic_prompt import REQUEST_ID
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.policies import Policy, TierRequest
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.decode_stream import Request, deserialize_request, serialize_request
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import decode_pb2

# With this many tokens, a policy's tiers show whether its budget changes anything.
TRIAL_TOKENS = 256


@dataclass(frozen=True)
class WireMethod:
    """Carry out a plan; see `Method`.

    Every message is serialized and parsed again, as gRPC does. The serialized bytes of all messages count: Begin,
    chunks and End.

    Attributes:
        plan: how the KV is scored, tiered and encoded.
        spec: the model's spec, for Begin.
        chunk_bytes: payload bytes at which a chunk is sent.
        metrics: counts every byte.
    """

    plan: KvPlan
    spec: ModelSpec
    chunk_bytes: int
    metrics: Metrics

    @property
    def policy(self) -> str:
        """Return the policy's name."""
        return self.plan.policy.name

    @property
    def codec(self) -> str:
        """Return the codec's name."""
        return self.plan.codec.name

    @property
    def scorer(self) -> str:
        """Return the scorer's name; empty if the policy uses no scores."""
        return self.plan.scorer if self.plan.policy.needs_scores else ""

    @property
    def scope(self) -> str:
        """Return "layer" if each layer has its own tiers, or "model"."""
        return self.plan.scope

    @property
    def budget(self) -> float:
        """Return the plan's budget."""
        return self.plan.budget.value

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """See `Method.send`.

        Returns:
            What sending took.

        Raises:
            SpectrumKVError: the KV cannot be encoded, or differs after the transfer.
        """
        pipeline = KvPipeline(self._begin(prompt), self.plan, pool.geometry, self.chunk_bytes, self.metrics)
        for layer in prompt.captured.layers:
            pipeline.put_layer(layer)
        pipeline.put_first_tokens(FirstToken(prompt.captured.first_token, finished=False))
        decoder = self.plan.decoder(pool.geometry)
        counted = 0
        with KvReceiver(pool, allocation, decoder, len(prompt.token_ids), self.metrics) as receiver:
            for message in pipeline.messages():
                serialized = serialize_request(message)
                counted += len(serialized)
                _deliver(receiver, deserialize_request(serialized), len(serialized))
        return SentBytes(counted, mean_tier_cost(pipeline.sent.tier_tokens))

    def _begin(self, prompt: Prompt) -> decode_pb2.Begin:
        return decode_pb2.Begin(
            request_id=REQUEST_ID,
            model=self.spec.to_proto(),
            codec=self.plan.codec_id,
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParams(seed=self.plan.seed).to_proto(),
        )


def is_fixed(policy: Policy) -> bool:
    """Return whether a policy gives the same tiers at its smallest and largest budget, so that one run suffices."""
    if policy.budget_kind is BudgetKind.BYTES:
        return False
    scores = torch.linspace(0.0, 1.0, TRIAL_TOKENS)
    least, most = (
        policy.assign(TierRequest(scores, budget, int4_allowed=True, seed=0))
        for budget in (policy.min_budget, policy.max_budget)
    )
    return torch.equal(least, most)


def _deliver(receiver: KvReceiver, message: Request, serialized_bytes: int) -> None:
    if isinstance(message, KvChunk):
        receiver.accept(message, serialized_bytes)
    elif message.HasField("end"):
        receiver.finish(message.end)
