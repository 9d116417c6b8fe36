"""What the scheduler's side tells the workers before a step, and what they tell it afterwards."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PrefillStep:
    """The part of a step that computes tokens of a prompt whose KV will be handed out.

    Attributes:
        request_id: as vLLM knows it.
        transfer_id: names the transfer.
        prompt_tokens: of the whole prompt.
        first: position of the first token that this step computes.
        count: tokens that it computes.
        block_ids: pages of the request, from its first token on.
        policy: that gives tokens their tiers.
        budget: what may be spent, of the policy's kind.
        fetches: how many requests will fetch the KV.
    """

    request_id: str
    transfer_id: str
    prompt_tokens: int
    first: int
    count: int
    block_ids: tuple[int, ...]
    policy: str
    budget: float
    fetches: int

    @property
    def is_last(self) -> bool:
        """Tell whether the prompt is complete after this step."""
        return self.first + self.count >= self.prompt_tokens


@dataclass(frozen=True)
class ProducerStep:
    """What producing workers do in a step.

    Attributes:
        prefills: prompts that are computed and handed out.
        discards: transfers that nobody will fetch.
    """

    prefills: tuple[PrefillStep, ...] = ()
    discards: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransferRef:
    """A transfer, as a request names it.

    Attributes:
        request_id: as vLLM knows it.
        transfer_id: names the transfer.
        addresses: "host:port" of each rank of the producer.
    """

    request_id: str
    transfer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Load(TransferRef):
    """KV that a consuming worker fetches.

    Attributes:
        tokens: whose KV is fetched, from the first on.
        skip: tokens at the beginning that are here already.
        block_ids: pages of the request, from its first token on.
    """

    tokens: int
    skip: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class ConsumerStep:
    """What consuming workers do in a step.

    Attributes:
        loads: KV to fetch.
        cancels: requests whose fetch is not wanted any more.
        releases: transfers to give up.
        prefetches: transfers to receive before their requests come.
        drops: ids of those that will not be used.
    """

    loads: tuple[Load, ...] = ()
    cancels: tuple[str, ...] = ()
    releases: tuple[TransferRef, ...] = ()
    prefetches: tuple[TransferRef, ...] = ()
    drops: tuple[str, ...] = ()


@dataclass
class Rejects:
    """Counts requests that the scheduler's side refused, by reason.

    Attributes:
        by_reason: how many.
    """

    by_reason: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Count one."""
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        taken, self.by_reason = self.by_reason, {}
        return taken
