"""Runs prompts through the model, one pass at a time: short prompts share a pass, long ones take several."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from spectrumkv.common.concurrency.threads import keep_all_cores
from spectrumkv.common.errors import CancelledError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.liveness.watchdog import stack_of
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME, KvHook
from spectrumkv.prefill_server.engine.chunked_prefill import CHUNK_TOKENS, ChunkedPrefill, chunk_bounds
from spectrumkv.prefill_server.engine.prompt_queue import PromptQueue, PromptResult, QueuedPrefill

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long `stop` waits for the passes that are queued; after a drain that is the layer that runs.
STOP_SECONDS = 8.0

# Most tokens of one pass over several prompts, padding included. A pass over few tokens spends its time on reading
# the weights, which several prompts then share; beyond that each further token costs the same in any pass.
BATCH_TOKENS = 1024
# Fewest tokens of a chunk where all logits are wanted: 50 MB of them for a vocabulary of 50,000.
LOGITS_CHUNK_TOKENS = 256


class PrefillEngine:
    """Runs the model behind a queue: short prompts first, and none waits for ever (`PromptQueue`).

    A context manager, which starts and stops it.

    Args:
        loaded: the model; its attention is switched to the hooked one.
        window: how many of the last queries of each layer the hook gets.
        chunk_tokens: fewest tokens of a long prompt's chunk; None for what suits the device. A chunk is never
            shorter than `window`, so that the last queries are in one chunk.

    Attributes:
        vitals: say whether passes make progress, layer by layer.
    """

    def __init__(self, loaded: LoadedModel, window: int, chunk_tokens: int | None = None) -> None:
        self.vitals = Vitals()
        self._model = loaded.model
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._device = loaded.device
        self._window = window
        least = chunk_tokens or CHUNK_TOKENS.get(self._device.type)
        self._chunk_tokens = None if least is None else max(least, window)
        # One thread: the model uses all cores, and a pool of compute threads belongs to the thread calling it.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefill-engine")
        self._thread: int | None = None
        self._queue: PromptQueue[QueuedPrefill] = PromptQueue()

    def start(self) -> None:
        """Start the thread, which keeps the cores that torch has now, whatever `use_one_thread` sets later."""
        self._executor.submit(keep_all_cores).result()
        self._thread = self._executor.submit(threading.get_ident).result()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def submit(
        self,
        token_ids: Sequence[int],
        kv_hook: KvHook,
        streams_chunks: bool = False,
        logits_hook: Callable[[torch.Tensor], None] | None = None,
    ) -> "Future[PromptResult]":
        """Queue a prompt.

        Args:
            token_ids: the prompt.
            kv_hook: called on the engine's thread with each layer's capture; an exception that it raises
                ends the prompt and becomes the future's.
            streams_chunks: whether the layers of a long prompt are shown chunk by chunk.
            logits_hook: takes the logits of all tokens, in chunks of `[tokens, vocab]`; the prompt then runs alone.

        Returns:
            A future that can be cancelled at any time, so that a thread that waits for it wakes at once. A running
            pass continues to its next layer, and ends there if it has no other prompt.
        """
        # The logits of a chunk of all tokens are in memory at once.
        chunk_tokens = self._chunk_tokens if logits_hook is None else max(LOGITS_CHUNK_TOKENS, self._window)
        bounds = chunk_bounds(len(token_ids), chunk_tokens)
        prompt = QueuedPrefill(token_ids, kv_hook, ChunkedPrefill(token_ids, bounds, streams_chunks, logits_hook))
        arrival = prompt.arrival = self._queue.put(prompt, len(token_ids))
        # The callback keeps only the number: a future that held its prompt would keep the prompt's cache in memory.
        prompt.outcome.add_done_callback(lambda _: self._queue.remove(arrival))
        # One call for each prompt. A call may run several prompts, and then a later one finds none left.
        self._executor.submit(self._run_next)
        return prompt.outcome

    def submit_call(self, call: Callable[[], T]) -> "Future[T]":
        """Queue another call that uses the model, so that it never runs beside a prompt.

        Returns:
            The call's future.
        """
        return self._executor.submit(call)

    @property
    def waiting(self) -> int:
        """Prompts that wait for their first pass, or for their next one."""
        return len(self._queue)

    def stop(self) -> None:
        """Finish all queued prompts and end the thread, unless it hangs; a second call does nothing."""
        try:
            finished = self._executor.submit(lambda: None)
        except RuntimeError:
            return
        self._executor.shutdown(wait=False)
        try:
            finished.result(STOP_SECONDS)
        except TimeoutError:
            self.vitals.fail(
                f"the prefill engine has not stopped within {STOP_SECONDS:g} s; its thread is at\n"
                f"{stack_of(self._thread)}"
            )
        else:
            self._executor.shutdown()

    def _run_next(self) -> None:
        """Run the next pass, if any prompt is left."""
        try:
            if batch := self._next_batch():
                self._run_pass(batch)
        except BaseException as error:  # nobody looks at this call's future, and its prompts would wait for ever
            logger.critical("the prefill engine failed", exc_info=error)
            self.vitals.fail(f"the prefill engine failed: {type(error).__name__}: {error}")

    def _run_pass(self, batch: list[QueuedPrefill]) -> None:
        """Run one pass; an error in it ends its prompts."""
        try:
            with self.vitals.working():
                if batch[0].chunked.runs_alone:
                    self._run_chunk(batch[0])
                else:
                    self._run_batch(batch)
        except Exception as error:  # noqa: BLE001  # the prompts' futures carry it
            for prompt in batch:
                prompt.fail(error)

    def _next_batch(self) -> list[QueuedPrefill]:
        """Take the prompts of the next pass.

        Returns:
            The prompt whose turn it is and those after it that fit into its pass, without those that have ended; a
            prompt that runs in chunks is alone.
        """
        batch: list[QueuedPrefill] = []

        def fits(prompt: QueuedPrefill) -> bool:
            together = (*batch, prompt)
            longest = max(len(one.token_ids) for one in together)
            alone = any(one.chunked.runs_alone for one in together)
            return not batch or (not alone and longest * len(together) <= BATCH_TOKENS)

        while (prompt := self._queue.take(fits)) is not None:
            batch.append(prompt)
        return [prompt for prompt in batch if not prompt.outcome.done()]

    def _call_again(self) -> None:
        """Queue a call for a prompt that has more chunks to run."""
        try:
            self._executor.submit(self._run_next)
        except RuntimeError:
            # The engine is stopping: it takes no new calls, and finishes the queued prompts here.
            self._run_next()

    @torch.inference_mode()
    def _run_chunk(self, prompt: QueuedPrefill) -> None:
        """Run one pass over the next chunk of a prompt; then others may have their turn."""
        started = time.monotonic()
        chunked = prompt.chunked

        def is_wanted() -> bool:
            self.vitals.beat()
            return not prompt.outcome.done()

        logits = chunked.run_chunk(self._model, prompt.observe, is_wanted, self._window)
        row = logits.float().cpu()
        prompt.computed_seconds += time.monotonic() - started
        if chunked.tokens_left:
            self._queue.put(prompt, chunked.tokens_left, prompt.arrival)
            if prompt.outcome.done():
                self._queue.remove(prompt.arrival)
            self._call_again()
            return
        waited = time.monotonic() - prompt.submitted - prompt.computed_seconds
        prompt.succeed(PromptResult(row, waited, prompt.computed_seconds))

    @torch.inference_mode()
    def _run_batch(self, batch: list[QueuedPrefill]) -> None:
        """Run one pass over all prompts of a batch, the shorter ones padded on the right."""
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
            kv_hooks=_hooks(batch, self.vitals.beat),
            lengths=lengths,
            window=self._window,
        ).logits
        # On a GPU the copy is what waits for the pass to end.
        logits = logits.float().cpu()
        seconds = time.monotonic() - started
        for prompt, length, positions in zip(batch, lengths, logits, strict=True):
            row = positions[last.index(length - 1)]
            prompt.succeed(PromptResult(row, started - prompt.submitted, seconds))


def _hooks(batch: list[QueuedPrefill], beat: Callable[[], None]) -> list[KvHook]:
    """Return a hook for each prompt; the last one ends the pass where nobody waits for any prompt any more."""

    def last_hook(capture: LayerCapture) -> None:
        beat()
        batch[-1].observe(capture)
        if all(prompt.outcome.done() for prompt in batch):
            raise CancelledError("every request of the pass has ended")

    return [*(prompt.observe for prompt in batch[:-1]), last_hook]
