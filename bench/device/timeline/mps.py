"""Run NVIDIA's Multi-Process Service, with which several processes compute on a GPU at the same time.

Without it the GPU switches between the processes: kernels of prefill and of decode take turns. The daemon gets a
directory of its own for its pipes, so that it meets no other daemon of the machine and no other program meets it.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spectrumkv.common.errors import FailedPreconditionError, UnavailableError

PROGRAM = "nvidia-cuda-mps-control"
START_SECONDS = 10.0
END_SECONDS = 10.0
# Between two questions to a daemon that has just been started.
ASK_AGAIN_SECONDS = 0.1


class MpsDaemon:
    """Hold a running daemon.

    Attributes:
        environment: of processes that shall use it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    def ask(self, question: str) -> str | None:
        """Return the daemon's answer to a command of its control program; None if no daemon answers in time."""
        try:
            asked = self._run(question)
        except subprocess.TimeoutExpired:
            return None
        return asked.stdout.strip() if asked.returncode == 0 else None

    def _run(self, question: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(  # noqa: S603  # NVIDIA's own program
            [PROGRAM],
            input=question + "\n",
            capture_output=True,
            text=True,
            env=dict(self.environment),
            timeout=END_SECONDS,
            check=False,
        )

    def check_used(self) -> None:
        """Check that some process has used the daemon, which starts a server for the first one.

        Raises:
            UnavailableError: no process has.
        """
        if not self.ask("get_server_list"):
            raise UnavailableError("the processes did not use MPS: its daemon has started no server")


@contextmanager
def mps_daemon() -> Iterator[MpsDaemon]:
    """Start a daemon, and end it and its servers with the block.

    Yields:
        The daemon.

    Raises:
        FailedPreconditionError: MPS is not installed, or does not start on this machine.
    """
    if shutil.which(PROGRAM) is None:
        raise FailedPreconditionError(f"{PROGRAM} is not on PATH; NVIDIA's driver brings it on Linux")
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        places = {f"CUDA_MPS_{name}_DIRECTORY": str(Path(directory, name.lower())) for name in ("PIPE", "LOG")}
        for place in places.values():
            Path(place).mkdir()
        daemon = MpsDaemon(dict(os.environ) | places)
        # In the foreground, so that it is a child that ends for certain.
        process = subprocess.Popen(  # noqa: S603
            [PROGRAM, "-f"],
            env=dict(daemon.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _wait_until_it_answers(daemon, process)
            yield daemon
        finally:
            _end(daemon, process)


def _wait_until_it_answers(daemon: MpsDaemon, process: "subprocess.Popen[str]") -> None:
    for _ in range(int(START_SECONDS / ASK_AGAIN_SECONDS)):
        if daemon.ask("get_server_list") is not None:
            return
        try:
            process.wait(ASK_AGAIN_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        said = process.stderr.read().strip() if process.stderr is not None else ""
        raise FailedPreconditionError(
            f"{PROGRAM} ended with status {process.returncode}: {said or 'it said nothing'}"
        )
    raise FailedPreconditionError(f"{PROGRAM} did not answer within {START_SECONDS:g} s")


def _end(daemon: MpsDaemon, process: "subprocess.Popen[str]") -> None:
    """Ask the daemon to quit, which ends its servers too, and kill it if it does not."""
    try:
        daemon.ask("quit")
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.communicate()
