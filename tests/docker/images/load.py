"""Requests from several threads that go on until somebody stops them."""

import threading
import time
from dataclasses import dataclass

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.security import ChannelSecurity

PROMPT = "The precision spectrum " * 8


@dataclass(frozen=True)
class Sent:
    """A request: when its first token came, and what ended it."""

    first_token: float | None
    error: str | None


class Load:
    """Sends requests while its `with` block runs; `sent` has them all afterwards.

    Args:
        address: of prefill.
        threads: how many requests are under way at once.
        max_tokens: of each request.
        security: how prefill is reached.
    """

    def __init__(
        self,
        address: str,
        threads: int = 4,
        max_tokens: int = 24,
        security: ChannelSecurity = ChannelSecurity(),  # noqa: B008  # frozen
    ) -> None:
        self.sent: list[Sent] = []
        self._client = SpectrumClient(address, security)
        self._sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    @property
    def errors(self) -> list[str]:
        """What ended the requests that failed."""
        return [one.error for one in self.sent if one.error is not None]

    def _run(self) -> None:
        while not self._over.is_set():
            one = self._send()
            self.sent.append(one)
            if one.error is not None:
                # Nobody is there: others get the processor.
                self._over.wait(0.1)

    def _send(self) -> Sent:
        first: float | None = None
        try:
            stream = self._client.generate(PROMPT, sampling=self._sampling)
            for _ in stream:
                first = first or time.monotonic()
            return Sent(first, None)
        except SpectrumKVError as error:
            return Sent(first, f"{error.code}: {error.message}")
