"""Stand-ins for vLLM's requests and scheduler output, with the fields that the connector reads."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """A request with a prompt of small token ids."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None = None
    prompt_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if self.prompt_token_ids is None:
            self.prompt_token_ids = list(range(self.num_prompt_tokens))


@dataclass
class New:
    """A request that is scheduled for the first time."""

    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int = 0


@dataclass
class Cached:
    """Requests that were scheduled before."""

    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass
class Output:
    """What the scheduler decided for a step."""

    scheduled_new_reqs: list[New] = field(default_factory=list)
    scheduled_cached_reqs: Cached = field(default_factory=Cached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)


def first_step(request_id: str, blocks: list[int], tokens: int, computed: int = 0) -> Output:
    """A step in which one request runs for the first time."""
    return Output([New(request_id, (blocks,), computed)], num_scheduled_tokens={request_id: tokens})


def next_step(request_id: str, blocks: list[int] | None, tokens: int, computed: int, resumed: bool = False) -> Output:
    """A step in which one request runs that ran before."""
    cached = Cached(
        [request_id], {request_id} if resumed else set(), [None if blocks is None else (blocks,)], [computed]
    )
    return Output(scheduled_cached_reqs=cached, num_scheduled_tokens={request_id: tokens})
