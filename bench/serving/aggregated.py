"""Serve by one process of transformers, the baseline of `serve`; the process runs for as long as a block does.

Requests and tokens are lines of JSON on the process's standard input and output, which is cheaper than the gRPC
between SpectrumKV and its clients.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import Any

from spectrumkv.bench.serving.load import Answer
from spectrumkv.common.errors import UnavailableError

# A line and the time of its arrival; None is the end of the process.
Line = tuple[dict[str, Any], float] | None


class AggregatedSystem:
    """Hold a running process of transformers; see `System`.

    Args:
        process: runs `spectrumkv.bench.serving.aggregated_process` with pipes.

    Raises:
        UnavailableError: the process ended before it was ready.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        self._process = process
        self._input = process.stdin
        self._output = process.stdout
        self._lock = threading.Lock()
        self._answers: dict[int, SimpleQueue[Line]] = {}
        self._requests = 0
        self._ended = False
        ready = self._output.readline()
        if not ready:
            raise self._death()
        self.description: dict[str, Any] = json.loads(ready)
        self._reader = threading.Thread(target=self._read, name="aggregated-output", daemon=True)
        self._reader.start()

    def complete(self, token_ids: Sequence[int], output_tokens: int) -> Answer:
        """Return the tokens and the times of their arrival; see `System.complete`.

        Raises:
            UnavailableError: the process ended.
        """
        answers: SimpleQueue[Line] = SimpleQueue()
        sent = time.perf_counter()
        self._send(token_ids, output_tokens, answers)
        arrivals: list[float] = []
        generated: list[int] = []
        while True:
            line = answers.get()
            if line is None:
                raise self._death()
            content, arrived = line
            if content["token_id"] is None:
                return Answer(tuple(arrivals), arrived - sent, token_ids=tuple(generated))
            arrivals.append(arrived - sent)
            generated.append(content["token_id"])

    def close(self) -> None:
        """Kill the process; nobody waits for what it still computes."""
        self._process.kill()
        self._reader.join()

    def _send(self, token_ids: Sequence[int], output_tokens: int, answers: "SimpleQueue[Line]") -> None:
        with self._lock:
            if self._ended:
                raise self._death()
            self._requests += 1
            self._answers[self._requests] = answers
            request = {"id": self._requests, "token_ids": list(token_ids), "output_tokens": output_tokens}
            try:
                self._input.write(json.dumps(request) + "\n")
                self._input.flush()
            except BrokenPipeError:
                raise self._death() from None

    def _read(self) -> None:
        for text in self._output:
            arrived = time.perf_counter()
            content = json.loads(text)
            self._answers[content["id"]].put((content, arrived))
        with self._lock:
            self._ended = True
            for answers in self._answers.values():
                answers.put(None)

    def _death(self) -> UnavailableError:
        return UnavailableError(
            f"the aggregated process ended with status {self._process.wait()}; its error is on standard error"
        )


@contextmanager
def aggregated_process(
    model: str | None, device: str, dtype: str, max_batch: int, max_tokens: int
) -> Iterator[AggregatedSystem]:
    """Start the baseline, wait until its model is loaded, and end it with the block.

    Args:
        model: see `load_model`.
        device: see `load_model`.
        dtype: see `load_model`.
        max_batch: largest number of requests in a batch.
        max_tokens: tokens of the longest prompt plus completion; the process ends if the context is shorter.

    Yields:
        The system.

    Raises:
        UnavailableError: the process ended before it was ready.
    """
    started_with = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "max_batch": max_batch,
        "max_tokens": max_tokens,
    }
    with subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", "spectrumkv.bench.serving.aggregated_process", json.dumps(started_with)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            with closing(AggregatedSystem(process)) as system:
                yield system
        finally:
            process.kill()
