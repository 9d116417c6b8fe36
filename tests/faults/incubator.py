"""Starts services in a second instead of ten: a process that has imported everything forks for each.

What it starts are processes like any other: they have a pid, can be killed and frozen, and end by themselves. Most of
the time of a start is importing torch and transformers, and a matrix of faults starts services dozens of times.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectrumkv.client.local.pair_config import DECODE_MODULE, PREFILL_MODULE
from spectrumkv.common.kv.codecs import prepare_codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.kernels import attention_scores, decode_attention
from tests.faults import names, sabotage

MODULES = (PREFILL_MODULE, DECODE_MODULE)
REAP_SECONDS = 0.02
# What no process has compiled before takes minutes on a machine that others use.
COMPILED_SECONDS = 600.0
# Of the tiny llama, which all services here run.
GEOMETRY = KvGeometry(layers=3, kv_heads=2, head_dim=64, native_dtype=torch.float32)


class ForkedProcess:
    """A service's process, with what the tests need of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._changed = threading.Condition()

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            assert self.returncode is not None
            return self.returncode

    def ended(self, returncode: int) -> None:
        with self._changed:
            self.returncode = returncode
            self._changed.notify_all()


class Incubator:
    """Starts services; a context manager. All of them end with it."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.incubator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        # One start at a time, so that each finds its own process.
        self._starting = threading.Lock()
        self._changed = threading.Condition()
        self._started: list[int] = []
        self._running: dict[int, ForkedProcess] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, command: Sequence[str], log: Path, switch: Path) -> ForkedProcess:
        """Start `python -m MODULE FLAGS…`, its stderr appended to `log`, open to sabotage by `switch`."""
        module, *flags = command[command.index("-m") + 1 :]
        assert module in MODULES
        assert self._process.stdin is not None
        with self._starting, self._changed:
            request = {"module": module, "flags": flags, "log": str(log), "switch": str(switch)}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answered = self._changed.wait_for(lambda: bool(self._started), COMPILED_SECONDS)
            assert answered, "the incubator does not answer"
            return self._running[self._started.pop()]

    def __enter__(self) -> "Incubator":
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self._running.values()):
            process.send_signal(signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._take(json.loads(line))

    def _take(self, told: dict[str, int]) -> None:
        with self._changed:
            if "started" in told:
                self._running[told["started"]] = ForkedProcess(told["started"])
                self._started.append(told["started"])
                self._changed.notify_all()
            else:
                self._running.pop(told["ended"]).ended(told["code"])


def _tell(**what: int) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _become(request: dict[str, Any]) -> None:
    """In the child: be the service."""
    os.setpgid(0, 0)
    with open(request["log"], "ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        os.dup2(nothing.fileno(), 0)
    sys.argv = [request["module"], *request["flags"]]
    code: Any = 1
    try:
        sabotage.install(Path(request["switch"]))
        names.install(Path(request["switch"]).parent)
        # Their commands also read the quota of processors, which here is the tests' own affair.
        importlib.import_module(f"{request['module']}.main").main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        sys.stderr.write("" if isinstance(end.code, int) else f"{end.code}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _tell(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


def _compile_in_a_child() -> None:
    """Compile what services do at their start, so that a dozen which start at once only read it.

    Where nothing was compiled before, each of them would compile all of it, and none would be ready in time. It is
    a child's work, since compiled loops start threads.
    """
    pid = os.fork()
    if pid == 0:
        try:
            prepare_codecs(GEOMETRY)
            attention_scores.prepare()
            decode_attention.prepare()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def main() -> None:
    for module in MODULES:
        importlib.import_module(f"{module}.main")
    _compile_in_a_child()
    assert threading.active_count() == 1, "a process with threads must not fork"
    while True:
        readable, _, _ = select.select([0], [], [], REAP_SECONDS)
        if readable:
            line = sys.stdin.readline()
            if not line:
                break
            pid = os.fork()
            if pid == 0:
                _become(json.loads(line))
            _tell(started=pid)
        _reap()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main()
