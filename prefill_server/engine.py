"""Runs prompts through the model, one at a time."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.attention import ATTENTION_NAME, KvTap
from spectrumkv.prefill_server.prompt_queue import PromptQueue

T = TypeVar("T")


@dataclass(frozen=True)
class PromptResult:
    """What a prompt's forward pass leaves, besides the KV that went through the tap.

    Attributes:
        logits: float32 `[vocab]` on the CPU, of the last position.
        queue_seconds: time before the pass began.
        compute_seconds: time that the pass took.
    """

    logits: torch.Tensor
    queue_seconds: float
    compute_seconds: float


@dataclass(eq=False)
class _Prompt:
    """A prompt that waits, and the future of whoever waits for it."""

    token_ids: Sequence[int]
    kv_tap: KvTap
    submitted: float
    outcome: "Future[PromptResult]" = field(default_factory=Future)


class PrefillEngine:
    """The model, behind a queue: short prompts first, and nobody for ever (`PromptQueue`).

    Args:
        loaded: the model; its attention is switched to the tapped one.
        window: how many of the last queries of each layer the tap gets.
    """

    def __init__(self, loaded: LoadedModel, window: int) -> None:
        self._model = loaded.model
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._device = loaded.device
        self._window = window
        # One thread: the model uses all cores, and a pool of compute threads belongs to the thread calling it.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefill-engine")
        self._queue: PromptQueue[_Prompt] = PromptQueue()

    def submit(self, token_ids: Sequence[int], kv_tap: KvTap) -> "Future[PromptResult]":
        """Queue a prompt.

        Args:
            token_ids: the prompt.
            kv_tap: called on the engine's thread with each layer's observation; an exception that it raises
                ends the pass and becomes the future's.

        Returns:
            A future that can be cancelled at any time: whoever waits for it is free at once. A pass that runs
            already goes on to its next layer, where the tap can end it.
        """
        prompt = _Prompt(token_ids, kv_tap, time.monotonic())
        self._queue.put(prompt, len(token_ids))
        prompt.outcome.add_done_callback(lambda _: self._queue.remove(prompt))
        self._executor.submit(self._settle_next)
        return prompt.outcome

    def submit_call(self, call: Callable[[], T]) -> "Future[T]":
        """Queue something else that uses the model, so that it never runs beside a prompt."""
        return self._executor.submit(call)

    @property
    def waiting(self) -> int:
        """Prompts that have not begun."""
        return len(self._queue)

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._executor.shutdown()

    def _settle_next(self) -> None:
        """Run the prompt whose turn it is, if one is left that somebody waits for, and hand over what comes of it."""
        prompt = self._queue.take()
        if prompt is None or prompt.outcome.cancelled():
            return
        # Only a future that was cancelled meanwhile takes no result.
        try:
            result = self._run(prompt)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever waits
            with suppress(InvalidStateError):
                prompt.outcome.set_exception(error)
        else:
            with suppress(InvalidStateError):
                prompt.outcome.set_result(result)

    @torch.inference_mode()
    def _run(self, prompt: _Prompt) -> PromptResult:
        started = time.monotonic()
        ids = torch.tensor([list(prompt.token_ids)], device=self._device)
        logits = self._model(
            input_ids=ids, use_cache=False, logits_to_keep=1, kv_tap=prompt.kv_tap, window=self._window
        ).logits
        row = logits[0, -1].float().cpu()
        return PromptResult(row, started - prompt.submitted, time.monotonic() - started)
