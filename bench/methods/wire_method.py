"""The product's own way: a plan, the messages that prefill would send, and the receiver of decode."""

from dataclasses import dataclass

import torch

from spectrumkv.bench.methods.served_model import Prompt, SentBytes
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.policies import BudgetKind, Policy, TierRequest
from spectrumkv.common.kv.tiers import mean_tier_cost
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.decode_stream import Request, deserialize_request, serialize_request
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import decode_pb2

# As long as the identifiers that the prefill service draws.
REQUEST_ID = "0" * 32
# On as many tokens a policy shows whether its budget changes anything.
TRIAL_TOKENS = 256


@dataclass(frozen=True)
class WireMethod:
    """A plan, carried out; see `Method`.

    Every message is serialized and parsed again, as gRPC would. Counted are the serialized bytes of all of them:
    Begin, chunks and End.

    Attributes:
        plan: how the KV is scored, tiered and coded.
        spec: the model's, for Begin.
        chunk_bytes: payload at which a chunk leaves.
        metrics: told of every byte.
    """

    plan: KvPlan
    spec: ModelSpec
    chunk_bytes: int
    metrics: Metrics

    @property
    def policy(self) -> str:
        """The policy's name."""
        return self.plan.policy.name

    @property
    def codec(self) -> str:
        """The codec's name."""
        return self.plan.codec.name

    @property
    def scorer(self) -> str:
        """The scorer's name; empty where the policy looks at no scores."""
        return self.plan.scorer if self.plan.policy.needs_scores else ""

    @property
    def scope(self) -> str:
        """Whether layers are tiered one by one or together."""
        return self.plan.scope

    @property
    def budget(self) -> float:
        """The plan's."""
        return self.plan.budget

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """See `Method.send`.

        Raises:
            SpectrumKVError: the KV cannot be coded, or what arrived is not what was sent.
        """
        pipeline = KvPipeline(self._begin(prompt), self.plan, pool.geometry, self.chunk_bytes, self.metrics)
        for layer in prompt.captured.layers:
            pipeline.put_layer(layer)
        pipeline.put_first_token(FirstToken(prompt.captured.first_token, finished=False))
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
    """Whether a policy does the same at its least and at its largest budget, so that one run says it all."""
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
