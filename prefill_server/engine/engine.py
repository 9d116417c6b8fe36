"""Runs prompts through the model, one pass at a time; short ones that wait share a pass, long ones take several."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from spectrumkv.common.concurrency.threads import keep_all_cores
from spectrumkv.common.errors import CancelledError, SpectrumKVError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME, KvHook
from spectrumkv.prefill_server.engine.chunked_prefill import CHUNK_TOKENS, ChunkedPrefill, chunk_bounds
from spectrumkv.prefill_server.engine.prompt_queue import PromptQueue

T = TypeVar("T")

# Tokens of one pass over several prompts, padding included. A pass over few tokens spends its time on reading the
# weights, which several prompts then share; of more tokens each costs the same alone or in company.
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class PromptResult:
    """What a prompt's forward pass leaves, besides the KV that went through the hook.

    Attributes:
        logits: float32 `[vocab]` on the CPU, of the last position.
        queue_seconds: time before the pass began, and between passes.
        compute_seconds: time that the pass took, or the passes.
    """

    logits: torch.Tensor
    queue_seconds: float
    compute_seconds: float


@dataclass(eq=False)
class QueuedPrefill:
    """A prompt in the queue or in a pass.

    Attributes:
        token_ids: at least one.
        kv_hook: takes each layer's capture.
        parts: the passes that it takes where it is long.
        submitted: monotonic time.
        arrival: its number in the queue.
        computed_seconds: what the passes so far took.
        outcome: what becomes of it.
    """

    token_ids: Sequence[int]
    kv_hook: KvHook
    parts: ChunkedPrefill
    submitted: float = field(default_factory=time.monotonic)
    arrival: int = 0
    computed_seconds: float = 0.0
    outcome: "Future[PromptResult]" = field(default_factory=Future)

    def observe(self, capture: LayerCapture) -> None:
        """Show a layer to the hook; what the hook raises ends this prompt and leaves others of the pass alone."""
        if self.outcome.done():
            return
        try:
            self.kv_hook(capture)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever waits
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End with an error, unless nobody waits any more."""
        if isinstance(error, SpectrumKVError):
            # The frames that it came through hold the prompt and its KV, and the prompt's future holds the error.
            error.__traceback__ = None
        with suppress(InvalidStateError):
            self.outcome.set_exception(error)

    def succeed(self, result: PromptResult) -> None:
        """End with a result, unless it has ended."""
        with suppress(InvalidStateError):
            self.outcome.set_result(result)


class PrefillEngine:
    """The model, behind a queue: short prompts first, and nobody for ever (`PromptQueue`).

    Args:
        loaded: the model; its attention is switched to the hooked one.
        window: how many of the last queries of each layer the hook gets.
        chunk_tokens: least tokens of a part of a long prompt; None is what suits the device. The last queries are in
            one part, whatever is said here.
    """

    def __init__(self, loaded: LoadedModel, window: int, chunk_tokens: int | None = None) -> None:
        self._model = loaded.model
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._device = loaded.device
        self._window = window
        least = chunk_tokens or CHUNK_TOKENS.get(self._device.type)
        self._chunk_tokens = None if least is None else max(least, window)
        # One thread: the model uses all cores, and a pool of compute threads belongs to the thread calling it.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefill-engine")
        self._executor.submit(keep_all_cores).result()
        self._queue: PromptQueue[QueuedPrefill] = PromptQueue()

    def submit(
        self, token_ids: Sequence[int], kv_hook: KvHook, streams_chunks: bool = False
    ) -> "Future[PromptResult]":
        """Queue a prompt.

        Args:
            token_ids: the prompt.
            kv_hook: called on the engine's thread with each layer's capture; an exception that it raises
                ends the prompt and becomes the future's.
            streams_chunks: whether the layers of a long prompt are shown part by part.

        Returns:
            A future that can be cancelled at any time: whoever waits for it is free at once. A pass that runs
            already goes on to its next layer, and ends there if it has no other prompt.
        """
        bounds = chunk_bounds(len(token_ids), self._chunk_tokens)
        prompt = QueuedPrefill(token_ids, kv_hook, ChunkedPrefill(token_ids, bounds, streams_chunks))
        arrival = prompt.arrival = self._queue.put(prompt, len(token_ids))
        # By its number: the prompt, which holds a cache, must not be held by its own future.
        prompt.outcome.add_done_callback(lambda _: self._queue.remove(arrival))
        # One call for each prompt; those that a call finds beside its own leave less to later ones.
        self._executor.submit(self._run_next)
        return prompt.outcome

    def submit_call(self, call: Callable[[], T]) -> "Future[T]":
        """Queue something else that uses the model, so that it never runs beside a prompt."""
        return self._executor.submit(call)

    @property
    def waiting(self) -> int:
        """Prompts that wait to begin, or to go on."""
        return len(self._queue)

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._executor.shutdown()

    def _run_next(self) -> None:
        """Run the prompts that are next, if any are left."""
        batch = self._next_batch()
        if not batch:
            return
        try:
            if batch[0].parts.several:
                self._run_chunk(batch[0])
            else:
                self._run(batch)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever waits
            for prompt in batch:
                prompt.fail(error)

    def _next_batch(self) -> list[QueuedPrefill]:
        """Take the prompt whose turn it is, and those after it that fit into the same pass; one in parts is alone."""
        batch: list[QueuedPrefill] = []

        def fits(prompt: QueuedPrefill) -> bool:
            together = (*batch, prompt)
            longest = max(len(one.token_ids) for one in together)
            alone = any(one.parts.several for one in together)
            return not batch or (not alone and longest * len(together) <= BATCH_TOKENS)

        while (prompt := self._queue.take(fits)) is not None:
            batch.append(prompt)
        return [prompt for prompt in batch if not prompt.outcome.done()]

    def _go_on(self) -> None:
        """Have a call for what was put back."""
        try:
            self._executor.submit(self._run_next)
        except RuntimeError:
            # The engine stops, takes no new calls, and finishes what is queued.
            self._run_next()

    @torch.inference_mode()
    def _run_chunk(self, prompt: QueuedPrefill) -> None:
        """One pass over the next part of a prompt; then others may have their turn."""
        started = time.monotonic()
        logits = prompt.parts.run(self._model, prompt.observe, lambda: not prompt.outcome.done(), self._window)
        row = logits.float().cpu()
        prompt.computed_seconds += time.monotonic() - started
        if prompt.parts.tokens_left:
            self._queue.put(prompt, prompt.parts.tokens_left, prompt.arrival)
            if prompt.outcome.done():
                self._queue.remove(prompt.arrival)
            self._go_on()
            return
        waited = time.monotonic() - prompt.submitted - prompt.computed_seconds
        prompt.succeed(PromptResult(row, waited, prompt.computed_seconds))

    @torch.inference_mode()
    def _run(self, batch: list[QueuedPrefill]) -> None:
        """One pass over all prompts of a batch, the shorter ones padded on the right."""
        started = time.monotonic()
        lengths = [len(prompt.token_ids) for prompt in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for row, prompt in zip(ids, batch, strict=True):
            row[: len(prompt.token_ids)] = torch.tensor(list(prompt.token_ids))
        last = sorted({length - 1 for length in lengths})
        logits = self._model(
            input_ids=ids.to(self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(last, device=self._device),
            kv_hooks=_hooks(batch),
            lengths=lengths,
            window=self._window,
        ).logits
        # On a GPU only this waits for what was computed.
        logits = logits.float().cpu()
        seconds = time.monotonic() - started
        for prompt, length, positions in zip(batch, lengths, logits, strict=True):
            row = positions[last.index(length - 1)]
            prompt.succeed(PromptResult(row, started - prompt.submitted, seconds))


def _hooks(batch: list[QueuedPrefill]) -> list[KvHook]:
    """A hook for each prompt; the pass ends where no prompt is left that anybody waits for."""

    def last_hook(capture: LayerCapture) -> None:
        batch[-1].observe(capture)
        if all(prompt.outcome.done() for prompt in batch):
            raise CancelledError("every request of the pass has ended")

    return [*(prompt.observe for prompt in batch[:-1]), last_hook]
