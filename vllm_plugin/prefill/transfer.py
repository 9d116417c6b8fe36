"""The coded KV of one prompt, and who has fetched it."""

from dataclasses import dataclass, field

from spectrumkv.common.errors import SpectrumKVError


@dataclass
class Transfer:
    """The coded KV of one prompt, as far as it was coded.

    Attributes:
        reserved_bytes: of the outbox's memory.
        fetches: how many requests will fetch it.
        consumers: how many ranks fetch it for one request; None before the first asked.
        messages: serialized, in order: header, chunks, end.
        complete: whether the last message is there.
        failure: why coding failed; None where it did not.
        expires_at: monotonic time after which it is dropped, unless it is being fetched.
        readers: fetches that are under way.
        fetched_by: ranks that fetched it, by request.
        given_up_by: requests that will not fetch it.
    """

    reserved_bytes: int
    fetches: int
    expires_at: float
    consumers: int | None = None
    messages: list[bytes] = field(default_factory=list)
    complete: bool = False
    failure: SpectrumKVError | None = None
    readers: int = 0
    fetched_by: dict[str, set[int]] = field(default_factory=dict)
    given_up_by: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Tell whether every request fetched it with all of its ranks, or gave it up."""
        consumers = self.consumers or 1
        fetched = {request_id for request_id, ranks in self.fetched_by.items() if len(ranks) >= consumers}
        return len(fetched | self.given_up_by) >= self.fetches

    def may_be_fetched(self, request_id: str, rank: int) -> bool:
        """Tell whether a request neither gave it up nor fetched it with a rank.

        Args:
            request_id: of the request.
            rank: of the consumer.

        Returns:
            Whether the rank may fetch it.
        """
        return request_id not in self.given_up_by and rank not in self.fetched_by.get(request_id, ())
