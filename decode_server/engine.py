"""The running batch: answers join and leave between steps, one forward pass serves them all."""

import logging
import threading
from collections.abc import Iterator, Sequence

import torch

from spectrumkv.common.concurrency.cuda_stream import is_device_lost
from spectrumkv.common.concurrency.threads import keep_all_cores
from spectrumkv.common.errors import InternalError, NotFiniteError, SpectrumKVError, UnavailableError
from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.liveness.watchdog import stack_of
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.model_check import ModelCheck
from spectrumkv.decode_server.model_runner import DecodeRow, model_runner
from spectrumkv.decode_server.request import DecodeAnswer, GeneratedToken

logger = logging.getLogger(__name__)

# The worker is broken once so many steps have failed one after another. A request's own fault never fails a step.
FAILED_STEPS = 3
# How long `stop` waits for the step that runs.
STOP_SECONDS = 5.0
_BROKEN = "this decode worker works no more and ends; try another worker"


class DecodeEngine:
    """Runs decode steps on a thread of its own, once started.

    Args:
        loaded: the model; its attention is switched to the slots.
        pool: the slots.
        max_running: answers in one batch; more wait for a place.
        metrics: count the steps.

    Attributes:
        vitals: say whether steps make progress. Once they fail, whoever says so, requests get UNAVAILABLE.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool, max_running: int, metrics: Metrics) -> None:
        self.vitals = Vitals()
        self._steps = metrics.decode_steps
        self._failed_in_a_row = 0
        self._given_up = False
        self._runner = model_runner(loaded, pool, max_running)
        self._model_check = ModelCheck(loaded, pool, self._runner)
        self._check_due = False
        self._max_running = max_running
        self._changed = threading.Condition()
        self._joined: list[DecodeAnswer] = []
        self._in_step: list[DecodeAnswer] = []
        self._stopping = False
        self.vitals.on_failure(self._give_up)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which keeps the cores that torch has now, whatever `use_one_thread` sets later."""
        self._thread.start()
        self._started.wait()

    @property
    def running(self) -> int:
        """How many answers are generated now."""
        return min(len(self._joined), self._max_running)

    @property
    def waiting(self) -> int:
        """How many answers wait for a place in the batch."""
        return max(0, len(self._joined) - self._max_running)

    def generate(self, answers: Sequence[DecodeAnswer], scope: RpcScope) -> Iterator[GeneratedToken]:
        """Yield the tokens of a request's answers until each has had its last one, as members of the running batch.

        An answer's slots are free once its last token is taken. When this generator ends or is closed, all answers
        have left the batch, and no step touches their slots any more.

        Args:
            answers: one or more of one request, started, with all KV in their slots.
            scope: the handler's RPC; when it ends, so does this generator.

        Raises:
            CancelledError: the caller went away.
            DeadlineExceededError: the deadline passed.
            UnavailableError: a step failed, or the worker works no more.
            InternalError: the logits of an answer are no numbers.
        """
        outcomes = answers[0].outcomes
        running = {answer.index: answer for answer in answers}
        self._join(answers)
        # The error only wakes this thread up; `check` then raises the one that says why the RPC is over.
        scope.on_end(lambda: outcomes.put(UnavailableError("the stream ended")))
        try:
            while running:
                outcome = outcomes.get()
                scope.check()
                if isinstance(outcome, SpectrumKVError):
                    raise outcome
                yield outcome
                if outcome.delta.finish is not None:
                    ended = running.pop(outcome.answer)
                    self._leave([ended])
                    ended.allocation.release()
        finally:
            self._leave(list(running.values()))

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until no request generates, but for no longer than `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._joined, seconds)

    def stop(self) -> None:
        """End the thread; requests that still run get UNAVAILABLE."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            self.vitals.fail(
                f"the decode engine has not stopped within {STOP_SECONDS:g} s; its thread is at\n"
                f"{stack_of(self._thread.ident)}"
            )

    def _join(self, answers: Sequence[DecodeAnswer]) -> None:
        with self._changed:
            if self._given_up:
                raise UnavailableError(_BROKEN)
            self._joined.extend(answers)
            self._changed.notify_all()

    def _give_up(self) -> None:
        with self._changed:
            self._given_up = True
            joined, self._joined = self._joined, []
            self._changed.notify_all()
        for answer in joined:
            answer.outcomes.put(UnavailableError(_BROKEN))

    def _leave(self, answers: Sequence[DecodeAnswer]) -> None:
        with self._changed:
            self._joined = [one for one in self._joined if one not in answers]
            # A step that hangs may touch the slots for ever: no other request gets them, since the process ends.
            self._changed.wait_for(lambda: self._given_up or not any(one in self._in_step for one in answers))

    def _run(self) -> None:
        keep_all_cores()
        self._started.set()
        try:
            self._run_until_stopped()
        except BaseException as error:  # without this thread every request would wait for ever
            logger.critical("the decode engine failed", exc_info=error)
            self.vitals.fail(f"the decode engine failed: {_named(error)}")

    def _run_until_stopped(self) -> None:
        while batch := self._next_batch():
            with self.vitals.working():
                self._end_step(self._advanced(batch))
                self._check_model_if_due()
        for answer in self._joined:
            answer.outcomes.put(UnavailableError("the decode service is shutting down; try another worker"))

    def _next_batch(self) -> list[DecodeAnswer]:
        """Return the next batch once there are requests; an empty one says that the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._joined or self._stopping or self._given_up)
            self._in_step = [] if self._stopping else self._joined[: self._max_running]
            return self._in_step

    def _end_step(self, finished: list[DecodeAnswer]) -> None:
        with self._changed:
            self._joined = [one for one in self._joined if one not in finished]
            self._in_step = []
            self._changed.notify_all()

    def _advanced(self, batch: list[DecodeAnswer]) -> list[DecodeAnswer]:
        """Return the answers that ended: those that are finished, or all where the step failed."""
        try:
            finished = self._step(batch)
        except Exception as error:  # noqa: BLE001  # whatever a step raises ends its requests first of all
            self._steps.labels("failed").inc()
            self._take_in_failure(error, batch)
            return batch
        self._steps.labels("ok").inc()
        self._failed_in_a_row = 0
        return finished

    @torch.inference_mode()
    def _check_model_if_due(self) -> None:
        """Look whether the model is broken, where a request's logits were no numbers."""
        if self._check_due:
            self._check_due = False
            if (failure := self._model_check.failure()) is not None:
                self.vitals.fail(failure)

    def _take_in_failure(self, error: Exception, batch: list[DecodeAnswer]) -> None:
        """Tell the requests of a failed step, and say whether the worker can go on at all."""
        logger.error("a decode step failed", exc_info=error)
        for answer in batch:
            answer.outcomes.put(UnavailableError(f"a decode step failed: {_named(error)}; try another worker"))
        self._failed_in_a_row += 1
        if is_device_lost(error):
            self.vitals.fail(f"the device is lost: {_named(error)}")
        elif self._failed_in_a_row == FAILED_STEPS:
            self.vitals.fail(f"{FAILED_STEPS} decode steps failed one after another, the last with {_named(error)}")

    @torch.inference_mode()
    def _step(self, batch: list[DecodeAnswer]) -> list[DecodeAnswer]:
        """Return the answers that ended, after each advanced by one token."""
        logits = self._runner.logits([DecodeRow(one, one.last_token, one.position) for one in batch])
        return [answer for answer, row in zip(batch, logits, strict=True) if self._ends(answer, row)]

    def _ends(self, answer: DecodeAnswer, logits: torch.Tensor) -> bool:
        """Return whether an answer ended, after it advanced; an error of its own (NaN logits, say) ends it alone."""
        try:
            return answer.advance(logits)
        except Exception as error:  # noqa: BLE001  # its neighbours in the batch must not suffer from it
            self._check_due |= isinstance(error, NotFiniteError)
            answer.outcomes.put(_own_failure(error))
            return True


def _own_failure(error: Exception) -> SpectrumKVError:
    """Return what the caller may know of an error in a request's own part of a step; the log has all of it."""
    if isinstance(error, SpectrumKVError):
        return error
    logger.error("a request failed after a decode step", exc_info=error)
    return InternalError(f"a decode step failed: {_named(error)}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
