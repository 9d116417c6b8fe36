"""A request on prefill: what it asks for, what it keeps from one decode worker to the next, and what it used."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.prefill_server.progress import Progress
from spectrumkv.prefill_server.prompt_tokens import PromptLogprobs
from spectrumkv.prefill_server.transfer import KvMap, KvPlan, SentKv
from spectrumkv.v1 import generation_pb2, prefill_pb2


@dataclass(eq=False)
class PrefillRequest:
    """A request that passed all checks, with what it keeps when it goes from one decode worker to the next.

    Attributes:
        request_id: named in the logs of both services.
        token_ids: the prompt.
        params: how tokens are chosen; the seed is set.
        plan: how the KV crosses the network.
        progress: how far the request came.
        echo: whether the client gets the prompt's tokens.
        prompt_logprobs: how many likeliest tokens the client gets for each of the prompt's tokens; None is none.
        kv_map: how finely the client hears at what precision the KV was sent.
        first: the first token of each answer, once they are sampled: every worker gets the same ones, and the client
            gets them once.
        finish: why the first answer ended; unspecified before it did.
        stage_seconds: what the request spent in the stages "queue" and "prefill", on all workers together.

    Raises:
        InvalidArgumentError: id, prompt or seed are missing.
    """

    request_id: str
    token_ids: Sequence[int]
    params: SamplingParams
    plan: KvPlan
    progress: Progress
    echo: bool = False
    prompt_logprobs: int | None = None
    kv_map: prefill_pb2.KvMapDetail = prefill_pb2.KV_MAP_DETAIL_UNSPECIFIED
    first: tuple[generation_pb2.Token, ...] = field(default=(), init=False)
    finish: generation_pb2.FinishReason = field(default=generation_pb2.FINISH_REASON_UNSPECIFIED, init=False)
    stage_seconds: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.request_id:
            raise InvalidArgumentError("a request has no id; both services' logs need one")
        if not self.token_ids:
            raise InvalidArgumentError("the prompt has no tokens")
        if self.params.seed is None:
            raise InvalidArgumentError("the request has no seed; tokens and scores are drawn from it")

    @property
    def slots(self) -> int:
        """Slots that decode will reserve for the request: for prompt and completion of each answer."""
        return (len(self.token_ids) + self.params.max_tokens) * self.params.n

    def new_prompt_logprobs(self) -> PromptLogprobs | None:
        """Return what takes the prompt's logits in a run of it; None where the client does not ask for them."""
        return None if self.prompt_logprobs is None else PromptLogprobs(self.token_ids, self.prompt_logprobs)

    def new_kv_map(self, plan: KvPlan, geometry: KvGeometry) -> KvMap | None:
        """Return what takes in the segments that leave for a worker; None where the client does not ask for a map.

        Args:
            plan: the request's plan with the codec that was chosen.
            geometry: shape and dtype of the model's cache.
        """
        if self.kv_map == prefill_pb2.KV_MAP_DETAIL_UNSPECIFIED:
            return None
        by_layer = self.kv_map == prefill_pb2.KV_MAP_DETAIL_LAYERS
        return KvMap(plan, geometry, len(self.token_ids), by_layer)

    def add_to_stage(self, stage: str, seconds: float) -> None:
        """Add time that the request spent in a stage, once more where it ran before on another worker."""
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    def usage(self, plan: KvPlan, sent: SentKv, geometry: KvGeometry, decode_worker: str) -> generation_pb2.Usage:
        """Return what the request used, once it is finished.

        Args:
            plan: the request's plan with the codec that was chosen.
            sent: what left for decode.
            geometry: shape and dtype of the model's cache.
            decode_worker: address of the worker that served the request.
        """
        token_layers = sum(sent.tier_tokens.values())
        nominal_cost = sum(tier.nominal_cost * tokens for tier, tokens in sent.tier_tokens.items())
        fp16_bytes = geometry.fp16_bytes(len(self.token_ids))
        return generation_pb2.Usage(
            prompt_tokens=len(self.token_ids),
            completion_tokens=self.progress.completion_tokens,
            tiers=[
                generation_pb2.TierUsage(
                    tier=tier.wire_name,
                    tokens=sent.tier_tokens[tier] / geometry.layers,
                    bytes=sent.tier_bytes[tier],
                )
                for tier in Tier
                if sent.tier_tokens[tier]
            ],
            kv_bytes_sent=sent.message_bytes,
            kv_fp16_bytes=fp16_bytes,
            budget_counted=sent.message_bytes / fp16_bytes,
            budget_nominal=nominal_cost / token_layers if token_layers else 0.0,
            ttft_seconds=self.progress.ttft_seconds,
            handoff_seconds=self.progress.handoff_seconds,
            policy=plan.policy.name,
            scorer=plan.scorer,
            codec=plan.codec.name,
            codec_reason=plan.codec_reason,
            recomputed_prompt_tokens=self.progress.recomputed_prompt_tokens,
            decode_worker=decode_worker,
        )
