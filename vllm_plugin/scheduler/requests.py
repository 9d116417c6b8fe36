"""What the state machines see of vLLM's requests."""

from collections.abc import Sequence
from typing import Any, Protocol


class EngineRequest(Protocol):
    """The part of `vllm.v1.request.Request` that the connector reads."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None
    prompt_token_ids: list[int] | None
    num_prompt_tokens: int


class ScheduledRequests(Protocol):
    """The part of `vllm.v1.core.sched.output.CachedRequestData` that the connector reads."""

    req_ids: list[str]
    resumed_req_ids: set[str]
    new_block_ids: list[tuple[list[int], ...] | None]
    num_computed_tokens: list[int]


class NewRequest(Protocol):
    """The part of `vllm.v1.core.sched.output.NewRequestData` that the connector reads."""

    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


class StepOutput(Protocol):
    """The part of `vllm.v1.core.sched.output.SchedulerOutput` that the connector reads."""

    @property
    def scheduled_new_reqs(self) -> Sequence[NewRequest]:
        """Return the requests that run for the first time, or again after they lost their pages."""
        ...

    @property
    def scheduled_cached_reqs(self) -> ScheduledRequests:
        """Return the requests that ran before."""
        ...

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Return how many tokens each request computes in this step."""
        ...
