"""Offer requests to a serving system at a rate, and keep the answer of each."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spectrumkv.client.timings import Timings
from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError


@dataclass(frozen=True)
class Answer:
    """Hold a system's answer to one request.

    Attributes:
        arrivals: when each token arrived, in seconds after the request was sent.
        ended: when the end of the answer arrived, on the same clock.
        kv_bytes_sent: bytes that sending the KV cache took; 0 if it stayed in one process.
        kv_fp16_bytes: bytes of the same KV cache at 16 bits per element.
        token_ids: the tokens; empty if the system does not report them.
    """

    arrivals: tuple[float, ...]
    ended: float
    kv_bytes_sent: int = 0
    kv_fp16_bytes: int = 0
    token_ids: tuple[int, ...] = ()


class System(Protocol):
    """Describe a system that serves requests."""

    def complete(self, token_ids: Sequence[int], output_tokens: int) -> Answer:
        """Generate exactly `output_tokens` tokens greedily after a prompt; called from many threads.

        Raises:
            SpectrumKVError: the request failed.
        """
        ...


@dataclass(frozen=True)
class Workload:
    """Hold requests and their arrival times.

    Attributes:
        prompts: token ids of each request.
        output_tokens: tokens that each request generates, 1 or more.
        arrivals: when each request arrives, in seconds after the start, ascending.
        max_concurrency: requests that run at once; the others wait, and their clocks start when they are sent.
    """

    prompts: tuple[tuple[int, ...], ...]
    output_tokens: int
    arrivals: tuple[float, ...]
    max_concurrency: int

    def __post_init__(self) -> None:
        for name, value in (
            ("--num-prompts", len(self.prompts)),
            ("--random-input-len", min(map(len, self.prompts), default=1)),
            ("--random-output-len", self.output_tokens),
            ("--max-concurrency", self.max_concurrency),
        ):
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; allowed: 1 or more")
        if len(self.arrivals) != len(self.prompts):
            raise ValueError(f"{len(self.arrivals)} arrivals for {len(self.prompts)} prompts")

    @classmethod
    def random(
        cls,
        prompts: int,
        input_tokens: int,
        output_tokens: int,
        rate: float | None,
        max_concurrency: int | None,
        vocab_size: int,
        seed: int,
    ) -> "Workload":
        """Return prompts of random tokens, drawn as `vllm bench serve --dataset-name random` does.

        Args:
            prompts: number of prompts.
            input_tokens: length of each prompt.
            output_tokens: tokens that each request generates.
            rate: requests per second, with exponentially distributed gaps; None is all at once.
            max_concurrency: requests that run at once; None is all.
            vocab_size: token ids are drawn uniformly below it.
            seed: seed of all draws.

        Raises:
            InvalidArgumentError: a number is below 1.
        """
        generator = np.random.default_rng(seed)
        ids = generator.integers(0, vocab_size, (max(prompts, 0), max(input_tokens, 0)))
        gaps = np.zeros(len(ids)) if rate is None else generator.exponential(1 / rate, len(ids))
        return cls(
            prompts=tuple(tuple(row) for row in ids.tolist()),
            output_tokens=output_tokens,
            arrivals=tuple(gaps.cumsum().tolist()),
            max_concurrency=len(ids) if max_concurrency is None else max_concurrency,
        )


@dataclass(frozen=True)
class Served:
    """Hold one request that was offered.

    Attributes:
        started: when the request was sent, in seconds after the start of the load.
        prompt_tokens: length of its prompt.
        answer: the answer; None if the request failed.
        error: why the request failed; None if it did not.
    """

    started: float
    prompt_tokens: int
    answer: Answer | None
    error: SpectrumKVError | None = None

    @property
    def timings(self) -> Timings:
        """Return the latencies, by the client's clock, of a request that did not fail.

        Raises:
            ValueError: the request failed.
        """
        if self.answer is None:
            raise ValueError("a failed request has no timings")
        return Timings.from_arrivals(self.answer.arrivals, self.answer.ended)


@dataclass(frozen=True)
class LoadResult:
    """Hold the requests of a load, and the seconds from its start to the end of its last request."""

    served: tuple[Served, ...]
    duration: float


def offer(workload: Workload, system: System, on_done: Callable[[], None] = lambda: None) -> LoadResult:
    """Offer a workload to a system and wait for all answers.

    Args:
        workload: the requests.
        system: the system that serves them.
        on_done: called from a request's thread when the request has ended.

    Returns:
        The requests with their answers, and the duration.
    """
    began = time.perf_counter()

    def serve(prompt: tuple[int, ...]) -> Served:
        started = time.perf_counter() - began
        try:
            return Served(started, len(prompt), system.complete(prompt, workload.output_tokens))
        except SpectrumKVError as error:
            return Served(started, len(prompt), None, error)
        finally:
            on_done()

    with ThreadPoolExecutor(workload.max_concurrency, thread_name_prefix="load") as clients:
        waiting: list[Future[Served]] = []
        for prompt, arrival in zip(workload.prompts, workload.arrivals, strict=True):
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            waiting.append(clients.submit(serve, prompt))
        served = tuple(future.result() for future in waiting)
    return LoadResult(served, time.perf_counter() - began)
