"""Run one service as a child process: say how to start it, follow its log, notice its end, and stop it."""

import subprocess
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from spectrumkv.common.service.tied import tied

KEPT_LINES = 20


@dataclass(frozen=True)
class ServiceLaunch:
    """Describe how one service is started and where clients find it.

    Args:
        name: "decode" or "prefill".
        command: the program and its arguments.
        address: where the service listens for gRPC.
        metrics_address: where the service listens for Prometheus.
        stop_seconds: how long the service may take to stop after SIGTERM.
        security: how clients talk to the service.
    """

    name: str
    command: tuple[str, ...]
    address: Address
    metrics_address: Address
    stop_seconds: float
    security: ChannelSecurity


class ServiceProcess:
    """Hold a running service.

    The service gets a process group of its own, so that Ctrl-C reaches only the parent, which then stops the
    services in order. A parent that is killed stops nothing: the service then stops by itself, because its standard
    input ends.

    Args:
        launch: what to start.
        on_line: called from another thread with each line of the service's log, without the newline. It must not
            wait for anybody, since the service's end is noticed after its last line.
        on_exit: called once from another thread with this object, when the process has ended and its log is read.
    """

    def __init__(
        self,
        launch: ServiceLaunch,
        on_line: Callable[[str], None],
        on_exit: Callable[["ServiceProcess"], None],
    ) -> None:
        self.launch = launch
        self._on_line = on_line
        self._on_exit = on_exit
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and modules
            tied(launch.command, launch.stop_seconds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
        self._follower = threading.Thread(target=self._follow, name=f"{launch.name}-log", daemon=True)
        self._follower.start()

    def stop(self) -> None:
        """Send SIGTERM, wait for at most `launch.stop_seconds`, then kill the service."""
        try:
            self._process.terminate()
            self._process.wait(self.launch.stop_seconds)
        except subprocess.TimeoutExpired:
            self._on_line(f"still running {self.launch.stop_seconds:g} s after SIGTERM; killed")
        finally:
            # A second Ctrl-C may have cut the wait short. Killing a process that has ended does nothing.
            self._process.kill()
            self._process.wait()
            self._follower.join()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def death(self) -> UnavailableError:
        """Return the error that says how the process ended, with the last lines of its log."""
        status = self._process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        said = "\n".join(f"  {line}" for line in self._last_lines) or "  (nothing)"
        return UnavailableError(f"the {self.launch.name} service {how}; its last log lines:\n{said}")

    def _follow(self) -> None:
        output = self._process.stdout
        if output is None:
            raise RuntimeError("the process was started without a pipe")
        try:
            with output:
                for line in output:
                    self._last_lines.append(line.rstrip("\n"))
                    self._on_line(line.rstrip("\n"))
        finally:
            self._process.wait()
            self._on_exit(self)
