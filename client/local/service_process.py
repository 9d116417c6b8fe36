"""One service as a child process: its log, its end, and how it is stopped."""

import subprocess
import threading
from collections import deque
from collections.abc import Callable

from spectrumkv.client.local.pair_config import ServiceLaunch
from spectrumkv.common.errors import UnavailableError

KEPT_LINES = 20


class ServiceProcess:
    """A running service.

    It gets a process group of its own, so that Ctrl-C reaches only the parent, which then stops the services
    in order.

    Args:
        launch: what to start.
        on_line: called with each line of its log, without the line's end, from another thread.
        on_exit: called once with this object when the process has ended and its log is read, from another
            thread.
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
            launch.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
        self._follower = threading.Thread(target=self._follow, name=f"{launch.name}-log", daemon=True)
        self._follower.start()

    def stop(self) -> None:
        """Ask the service to end (SIGTERM), wait for as long as it may take, then kill it."""
        try:
            self._process.terminate()
            self._process.wait(self.launch.stop_seconds)
        except subprocess.TimeoutExpired:
            self._on_line(f"still running {self.launch.stop_seconds:g} s after SIGTERM; killed")
        finally:
            # Also where a second Ctrl-C cut the wait short. It does nothing to a process that is over.
            self._process.kill()
            self._process.wait()
            self._follower.join()

    def death(self) -> UnavailableError:
        """Return the error that says how the process ended and what it said last."""
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
