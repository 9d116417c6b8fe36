"""What the kernel says of a service's process."""

import os
from pathlib import Path


class Process:
    """What the kernel says of a service's process."""

    def __init__(self, port: int) -> None:
        self.pid = next(pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if listens(pid, port))

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def listens(pid: int, port: int) -> bool:
    """Whether a process is the service that was started to listen on a port."""
    try:
        return f"--listen=127.0.0.1:{port}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        # It has ended.
        return False
