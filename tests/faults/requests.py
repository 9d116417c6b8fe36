"""Requests that faults happen to, and those that must go on meanwhile."""

import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.security import ChannelSecurity, TlsFiles

WAIT_SECONDS = 60.0
PLAINTEXT = ChannelSecurity()


def prompt(tokens: int) -> TokenIds:
    return TokenIds(tuple(5 + 37 * place % 40000 for place in range(tokens)))


class RunningRequest:
    """A request in this process, read by a thread of its own."""

    def __init__(
        self,
        address: str,
        prompt_tokens: int,
        max_tokens: int,
        timeout: float = 600.0,
        security: ChannelSecurity = PLAINTEXT,
    ) -> None:
        self._client = SpectrumClient(address, security)
        self._changed = threading.Condition()
        self.token_ids: list[int] = []
        self.error: SpectrumKVError | None = None
        self.ended_at: float | None = None
        self.sent_at = time.monotonic()
        self.timeout = timeout
        self._stream = self._client.generate(
            prompt(prompt_tokens),
            sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
            kv=KvChoice(policy="fp16"),
            timeout=timeout,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for token in self._stream:
                with self._changed:
                    self.token_ids.append(token.token_id)
                    self._changed.notify_all()
        except SpectrumKVError as error:
            self.error = error
        with self._changed:
            self.ended_at = time.monotonic()
            self._changed.notify_all()

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def wait_for_tokens(self, count: int, seconds: float = WAIT_SECONDS) -> None:
        """Wait for so many tokens in all; the end of the request ends the wait too."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.tokens >= count or self.ended_at is not None, seconds)
            assert self.tokens >= count, f"ended after {self.tokens} tokens: {self.error}"

    def wait_for_end(self, seconds: float) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended_at is not None, seconds), "the client was told nothing"

    def cancel(self) -> None:
        self._stream.cancel()

    def close(self) -> None:
        self._stream.cancel()
        self._client.close()
        self._thread.join(WAIT_SECONDS)


class RequestInProcess:
    """The same in a process of its own, which can be killed."""

    def __init__(
        self, address: str, prompt_tokens: int, max_tokens: int, security: ChannelSecurity = PLAINTEXT
    ) -> None:
        tls = security.tls
        files = () if tls is None else (tls.cert, tls.key, tls.ca, security.token_file)
        arguments = (address, prompt_tokens, max_tokens, *files)
        command = [sys.executable, "-m", "tests.faults.requests", *map(str, arguments)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.tokens = 0
        threading.Thread(target=self._read, daemon=True).start()
        assert self._lines.get(timeout=WAIT_SECONDS) == "sent\n"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)

    def wait_for_tokens(self, count: int) -> None:
        while self.tokens < count:
            assert self._lines.get(timeout=WAIT_SECONDS) == "token\n"
            self.tokens += 1

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()


def main(address: str, prompt_tokens: str, max_tokens: str, *files: str) -> None:
    security = PLAINTEXT
    if files:
        cert, key, ca, token_file = map(Path, files)
        security = ChannelSecurity(TlsFiles(cert, key, ca), token_file)
    request = RunningRequest(address, int(prompt_tokens), int(max_tokens), security=security)
    sys.stdout.write("sent\n")
    sys.stdout.flush()
    for count in range(1, int(max_tokens)):
        request.wait_for_tokens(count, 600.0)
        sys.stdout.write("token\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
