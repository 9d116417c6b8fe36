"""Finds out whether it is the model that is broken, once a request has failed in a way that no request should."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import grpc
import torch

from spectrumkv.common.errors import CancelledError, NotFiniteError, SpectrumKVError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.engine import PrefillEngine, PromptResult

# Short and plain: a model that computes no numbers for it computes none for anybody.
PROMPT = "Once upon a time there was a little town by the sea."


class ModelCheck:
    """Runs a prompt of its own after a failure of the model, and ends the service where that fails as well.

    Failures alone prove nothing: a caller may have found a prompt that overflows the model's dtype, and must not be
    able to end the service by repeating it.

    Args:
        loaded: the model.
        engine: runs the model; its vitals fail where the model is broken.
    """

    def __init__(self, loaded: LoadedModel, engine: PrefillEngine) -> None:
        self._token_ids: list[int] = loaded.tokenizer(PROMPT, verbose=False).input_ids
        self._engine = engine
        self._running = threading.Lock()

    @contextmanager
    def after_failure(self) -> Iterator[None]:
        """Check the model where the block fails for a reason that lies in the model or the machine.

        Raises:
            Exception: what the block raised.
        """
        try:
            yield
        except Exception as error:
            ours = isinstance(error, SpectrumKVError | grpc.RpcError) and not isinstance(error, NotFiniteError)
            if not ours and self._running.acquire(blocking=False):
                self._start()
            raise

    def _start(self) -> None:
        try:
            outcome = self._engine.submit(self._token_ids, _require_numbers)
        except RuntimeError:
            # The engine has stopped.
            self._running.release()
            return
        outcome.add_done_callback(self._judge)

    def _judge(self, outcome: "Future[PromptResult]") -> None:
        self._running.release()
        if outcome.cancelled():
            return
        error = outcome.exception()
        if error is None and not bool(outcome.result().logits.isfinite().all()):
            error = NotFiniteError("the logits are infinite or NaN")
        if error is not None and not isinstance(error, CancelledError):
            self._engine.vitals.fail(
                f"the model fails on requests and on a prompt of the service's own: {type(error).__name__}: {error}"
            )


def _require_numbers(capture: LayerCapture) -> None:
    """Look at one layer of the prompt.

    Raises:
        NotFiniteError: something in it is infinite or NaN.
    """
    for states in (capture.queries, capture.keys, capture.values):
        if not bool(torch.isfinite(states).all()):
            raise NotFiniteError(f"queries, keys or values of layer {capture.layer} are infinite or NaN")
