"""The running batch: requests join and leave between steps, one forward pass serves them all."""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from spectrumkv.common.concurrency.threads import keep_all_cores
from spectrumkv.common.errors import InternalError, SpectrumKVError, UnavailableError
from spectrumkv.common.generation.sampling import SampledToken, Sampler
from spectrumkv.common.generation.text import FinishReason, TextStream
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.decode_server.model_runner import DecodeRow, model_runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedToken:
    """One token with the text that became certain with it.

    Attributes:
        index: 0 is the token that prefill sampled, so decode's first is 1.
        sampled: token id and log-probabilities.
        text: may be empty, never splits a character.
        finish: set with the last token.
    """

    index: int
    sampled: SampledToken
    text: str
    finish: FinishReason | None


@dataclass(eq=False)
class Sequence:
    """A request in the running batch.

    Attributes:
        allocation: its slots; the prompt's KV fills the first `length` of them.
        prompt_tokens: tokens whose KV was received.
        length: filled slots.
        index: index of `last_token` among the generated tokens.
        last_token: what the next step reads.
        sampler: chooses tokens; has seen the prompt and every token so far.
        text: makes text of tokens; has seen every token so far.
        recomputed_prompt_tokens: prompt tokens that went through the model here although their KV had arrived.
    """

    allocation: Allocation
    prompt_tokens: int
    length: int
    index: int
    last_token: int
    sampler: Sampler
    text: TextStream
    recomputed_prompt_tokens: int = 0
    outcomes: "queue.SimpleQueue[GeneratedToken | SpectrumKVError]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        if not 0 < self.length < self.allocation.capacity:
            raise ValueError(f"{self.length} filled slots leave no room in {self.allocation.capacity}")

    def advance(self, logits: torch.Tensor) -> bool:
        """Choose the next token from `[vocab]` logits and hand it out; return whether it was the last."""
        self.recomputed_prompt_tokens += self.length < self.prompt_tokens
        self.length += 1
        self.index += 1
        sampled = self.sampler.sample(logits, self.index)
        self.last_token = sampled.token_id
        delta = self.text.push(sampled.token_id)
        self.outcomes.put(GeneratedToken(self.index, sampled, delta.text, delta.finish))
        return delta.finish is not None


class DecodeEngine:
    """Runs decode steps on a thread of its own.

    Args:
        loaded: the model; its attention is switched to the slots.
        pool: the slots.
        max_running: requests in one batch; more wait for a place.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool, max_running: int) -> None:
        self._steps = model_runner(loaded, pool, max_running)
        self._max_running = max_running
        self._changed = threading.Condition()
        self._joined: list[Sequence] = []
        self._in_step: list[Sequence] = []
        self._stopping = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def running(self) -> int:
        """Requests that generate now."""
        return min(len(self._joined), self._max_running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return max(0, len(self._joined) - self._max_running)

    def generate(self, sequence: Sequence, scope: RpcScope) -> Iterator[GeneratedToken]:
        """Join the running batch and yield tokens until the last one.

        The sequence has left the batch, and nothing touches its slots any more, when this generator ends or
        is closed.

        Raises:
            CancelledError: the caller went away.
            DeadlineExceededError: its time ran out.
            SpectrumKVError: the step failed.
        """
        self._join(sequence)
        # An error in the queue wakes this thread up; `check` then says which error it really is.
        scope.on_end(lambda: sequence.outcomes.put(UnavailableError("the stream ended")))
        try:
            while True:
                outcome = sequence.outcomes.get()
                scope.check()
                if isinstance(outcome, SpectrumKVError):
                    raise outcome
                yield outcome
                if outcome.finish is not None:
                    return
        finally:
            self._leave(sequence)

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until no request generates, so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._joined, seconds)

    def stop(self) -> None:
        """End the thread; requests that still run get UNAVAILABLE."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _join(self, sequence: Sequence) -> None:
        with self._changed:
            self._joined.append(sequence)
            self._changed.notify_all()

    def _leave(self, sequence: Sequence) -> None:
        with self._changed:
            if sequence in self._joined:
                self._joined.remove(sequence)
            self._changed.wait_for(lambda: sequence not in self._in_step)

    def _run(self) -> None:
        keep_all_cores()
        self._started.set()
        while batch := self._next_batch():
            try:
                finished = self._step(batch)
            except Exception as error:  # noqa: BLE001  # whatever a step raises ends its requests, not the engine
                failure = _failure(error)
                finished = batch
                for sequence in batch:
                    sequence.outcomes.put(failure)
            self._end_step(finished)
        for sequence in self._joined:
            sequence.outcomes.put(UnavailableError("the decode service is shutting down; try another worker"))

    def _next_batch(self) -> list[Sequence]:
        """Wait for work; an empty batch means stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._joined or self._stopping)
            self._in_step = [] if self._stopping else self._joined[: self._max_running]
            return self._in_step

    def _end_step(self, finished: list[Sequence]) -> None:
        with self._changed:
            self._joined = [one for one in self._joined if one not in finished]
            self._in_step = []
            self._changed.notify_all()

    @torch.inference_mode()
    def _step(self, batch: list[Sequence]) -> list[Sequence]:
        """Advance every sequence by one token; return those that ended."""
        rows = self._steps.logits([DecodeRow(one.last_token, one.length, one.allocation) for one in batch])
        return [sequence for sequence, row in zip(batch, rows, strict=True) if _ends(sequence, row)]


def _ends(sequence: Sequence, logits: torch.Tensor) -> bool:
    """Advance one sequence; what is wrong with it alone (NaN logits, say) ends it alone."""
    try:
        return sequence.advance(logits)
    except Exception as error:  # noqa: BLE001  # its neighbours in the batch must not suffer from it
        sequence.outcomes.put(_failure(error))
        return True


def _failure(error: Exception) -> SpectrumKVError:
    """What callers may know of an error in a step; the log has all of it."""
    if isinstance(error, SpectrumKVError):
        return error
    logger.error("a decode step failed", exc_info=error)
    return InternalError(f"a decode step failed: {type(error).__name__}: {error}")
