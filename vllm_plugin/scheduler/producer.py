"""Follows the prompts of a producer whose KV will be handed out."""

from dataclasses import dataclass, field

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.vllm_plugin.scheduler.params import DecodeElsewhere, PrefillElsewhere, prompt_digest
from spectrumkv.vllm_plugin.scheduler.requests import EngineRequest, StepOutput
from spectrumkv.vllm_plugin.scheduler.steps import PrefillStep, ProducerStep, Rejects


@dataclass
class _Prompt:
    """One request that is being computed."""

    wanted: DecodeElsewhere
    prompt_tokens: int
    policy: str
    budget: float
    block_ids: list[int] = field(default_factory=list)
    handed_out: bool = False


class ProducerSchedule:
    """Follows requests from their arrival to their end, and says what workers do in each step.

    Pages are copied in the step that completes the prompt, layer by layer, so that vLLM may free them when it likes.

    Args:
        host: by which consumers reach the workers.
        port: of rank 0.
        ranks: of the tensor-parallel group.
        policy: of requests that name none.
        budget: of requests that name none.
    """

    def __init__(self, host: str, port: int, ranks: int, policy: str, budget: float) -> None:
        self._host, self._port, self._ranks = host, port, ranks
        self._policy, self._budget = policy, budget
        self._prompts: dict[str, _Prompt] = {}
        self._discards: list[str] = []
        self.rejects = Rejects()

    def arrived(self, request: EngineRequest) -> None:
        """Take in a request.

        Args:
            request: that vLLM has queued.
        """
        try:
            wanted = DecodeElsewhere.of(request.request_id, request.kv_transfer_params)
        except InvalidArgumentError:
            self.rejects.add("params")
            return
        if wanted is None:
            return
        if not request.prompt_token_ids or len(request.prompt_token_ids) != request.num_prompt_tokens:
            # Prompts of embeddings have no tokens that a consumer could compare.
            self.rejects.add("embeddings")
            return
        policy = wanted.policy or self._policy
        # Bit for bit has one price.
        budget = 1.0 if policy == "native" else (wanted.budget or self._budget)
        self._prompts[request.request_id] = _Prompt(wanted, request.num_prompt_tokens, policy, budget)

    def step(self, output: StepOutput) -> ProducerStep:
        """Say what workers do in a step.

        Args:
            output: what the scheduler decided.

        Returns:
            The step.
        """
        prefills = []
        for new in output.scheduled_new_reqs:
            self._take_pages(new.req_id, new.block_ids, restart=True)
            prefills += self._prefill(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, pages, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            self._take_pages(request_id, pages, restart=request_id in cached.resumed_req_ids)
            prefills += self._prefill(request_id, computed, output)
        discards, self._discards = tuple(self._discards), []
        return ProducerStep(tuple(prefills), discards)

    def finished(self, request: EngineRequest, delivered: bool) -> dict[str, object] | None:
        """Take in that a request ended.

        Args:
            request: that ended.
            delivered: whether it generated what it was asked for and may go on elsewhere.

        Returns:
            The parameters for the consumer; None where nothing is handed out.
        """
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None:
            return None
        transfer_id = prompt.wanted.transfer_id
        if not delivered or not prompt.handed_out:
            self._discards.append(transfer_id)
            return None
        return PrefillElsewhere(
            transfer_id=transfer_id,
            host=self._host,
            port=self._port,
            ranks=self._ranks,
            tokens=prompt.prompt_tokens,
            policy=prompt.policy,
            budget=prompt.budget,
            digest=prompt_digest(request.prompt_token_ids or ()),
        ).to_params()

    def _take_pages(self, request_id: str, pages: tuple[list[int], ...] | None, restart: bool) -> None:
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return
        if restart:
            prompt.block_ids = []
        if pages:
            prompt.block_ids += pages[0]

    def _prefill(self, request_id: str, computed: int, output: StepOutput) -> list[PrefillStep]:
        prompt = self._prompts.get(request_id)
        # What is computed after the prompt is decoding; a prompt that was preempted later is handed out already.
        if prompt is None or prompt.handed_out or computed >= prompt.prompt_tokens:
            return []
        count = min(output.num_scheduled_tokens[request_id], prompt.prompt_tokens - computed)
        step = PrefillStep(
            request_id=request_id,
            transfer_id=prompt.wanted.transfer_id,
            prompt_tokens=prompt.prompt_tokens,
            first=computed,
            count=count,
            block_ids=tuple(prompt.block_ids),
            policy=prompt.policy,
            budget=prompt.budget,
            fetches=prompt.wanted.fetches,
        )
        prompt.handed_out = step.is_last
        return [step]
