"""A request on prefill: what it asks for, the token that it gets from here, and how many there are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.prefill_server.transfer.pipeline import FirstToken
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import generation_pb2


@dataclass(frozen=True)
class PrefillRequest:
    """A request that was found good.

    Attributes:
        request_id: named in the logs of both services.
        token_ids: the prompt.
        params: how tokens are chosen; the seed is set.
        plan: how the KV crosses the network.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    plan: KvPlan

    @property
    def slots(self) -> int:
        """Slots that decode will reserve for it."""
        return len(self.token_ids) + self.params.max_tokens


@dataclass(frozen=True)
class FirstResponse:
    """The token that prefill samples, once for a request.

    Attributes:
        message: for the client.
        token: for decode.
        finish: why the generation ends, if it ends with this token.
    """

    message: generation_pb2.Token
    token: FirstToken
    finish: generation_pb2.FinishReason


class RequestsInService:
    """How many requests are in the service now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one request for as long as the block runs."""
        with self._lock:
            self.count += 1
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1
