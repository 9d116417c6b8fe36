"""Tries forms in a process of its own, so that a form which crashes its compiler ends that process and no service.

llguidance bounds its work, but not the depth of its recursion: a grammar of 60 KB whose rules name one another in a
chain overflows the stack, and the kernel ends the process. Other forms take minutes, in which no other thread of
Python runs. So each new form is compiled, and a few tokens are matched, by a fork of a small helper with a limit on
its time, its memory and its stack. What comes through is then compiled in the service.
"""

import json
import resource
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from copy import copy

from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InternalError, ResourceExhaustedError
from spectrumkv.common.generation.structured.form import StructuredOutput
from spectrumkv.common.generation.structured.trial_process import read_block, write_block

# Of a processor, for one form. The hardest forms that llguidance's own limits let through take a second.
CPU_SECONDS = 2.0
# How long a form may wait for those that came before it: with its own time that is less than prefill waits for decode
# to admit a request, so that a worker with many forms is passed over and not taken for one that fails.
WAIT_SECONDS = 5.0
RETRY_AFTER_SECONDS = 1.0
# What glibc gives a thread where the limit on stacks is none.
UNLIMITED_STACK_BYTES = 2 << 20
_HELPER = "spectrumkv.common.generation.structured.trial_process"


class FormTrial:
    """Tries forms, one at a time.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's embedding.
        eos_token_ids: the model's end-of-sequence tokens; None is the tokenizer's own.
        cpu_seconds: of a processor that one form may take.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos_token_ids: Sequence[int] | None,
        cpu_seconds: float = CPU_SECONDS,
    ) -> None:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        settings = {
            "tokenizer": backend.to_str(),
            "vocab_size": vocab_size,
            "eos_token_ids": eos_token_ids or tokenizer.eos_token_id,
            "cpu_seconds": cpu_seconds,
            # Half of what the service's threads have, so that what comes through there comes through here.
            "stack_bytes": thread_stack_bytes() // 2,
        }
        self._settings = json.dumps(settings).encode()
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], FormTrial] | None = None

    def start(self) -> None:
        """Start the helper, which takes a second to be ready; the first form then waits less."""
        # A helper that cannot be started is an error to whoever asks it.
        with self._lock, suppress(OSError):
            self._started()

    def refusal(self, form: StructuredOutput) -> str:
        """Return why a form cannot be used; empty where it can.

        Args:
            form: as a request gave it.

        Raises:
            ResourceExhaustedError: other forms take too long.
            InternalError: the helper has ended.
        """
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise ResourceExhaustedError(
                "other requests' forms of structured output are being compiled; try again later", RETRY_AFTER_SECONDS
            )
        try:
            # The helper may have ended while nobody asked it, by the kernel's want of memory for one.
            answer = self._asked(form)
            if answer is None:
                answer = self._asked(form)
        finally:
            self._lock.release()
        if answer is None:
            raise InternalError(
                "the process that tries forms of structured output ends when it is asked; see its host"
            )
        return answer.decode()

    def _asked(self, form: StructuredOutput) -> bytes | None:
        """Return the helper's answer; None where it has ended."""
        try:
            helper = self._started()
            assert helper.stdin is not None
            assert helper.stdout is not None
            write_block(helper.stdin, form.to_proto().SerializeToString())
            answer = read_block(helper.stdout)
        except OSError:
            answer = None
        if answer is None and self._stop is not None:
            self._stop()
            self._helper = self._stop = None
        return answer

    def _started(self) -> "subprocess.Popen[bytes]":
        """Return the helper, started where there is none."""
        if self._helper is None:
            self._helper = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
                (sys.executable, "-m", _HELPER),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # A signal from the terminal is for the service, which still answers requests.
                start_new_session=True,
            )
            self._stop = weakref.finalize(self, _end, self._helper)
            assert self._helper.stdin is not None
            write_block(self._helper.stdin, self._settings)
        return self._helper


def thread_stack_bytes() -> int:
    """Return the size of the stacks that this process's threads get."""
    chosen = threading.stack_size()
    if chosen:
        return chosen
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return UNLIMITED_STACK_BYTES if soft == resource.RLIM_INFINITY else soft


def _end(helper: "subprocess.Popen[bytes]") -> None:
    """End the helper and what it tries: its fork has a limit of time, and nobody waits for it any more."""
    helper.kill()
    helper.wait()
    for stream in (helper.stdin, helper.stdout):
        assert stream is not None
        # What was not sent to a helper that has ended is lost with it.
        with suppress(BrokenPipeError):
            stream.close()
