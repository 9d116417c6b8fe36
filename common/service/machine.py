"""Says what this process may use of its machine: processors, memory and connections, as far as the system lets it.

This module imports nothing large, since the number of threads must be known before the libraries that start them.
"""

import os
import resource
from contextlib import suppress
from pathlib import Path

from spectrumkv.common.service import cgroup

# What requests take besides weights and KV: activations, messages, stacks of threads.
REQUESTS_BYTES = 128 << 20
# More connections than this would take more memory than they are worth.
MAX_CONNECTIONS = 4096
_STATUS = Path("/proc/self/status")


def affinity() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors() -> int:
    """Return how many processors this process may keep busy: by its affinity, and by its groups' quota."""
    return min(affinity(), cgroup.processor_limit() or affinity())


def taken_bytes() -> int:
    """Return the memory that this process holds and the kernel cannot take back, in bytes; 0 where nobody says.

    Pages of files that it has read are not counted: the kernel drops them first.
    """
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "RssAnon":
                return int(value.split()[0]) << 10
    return 0


def bytes_left() -> int | None:
    """Return how many bytes this process may take beside all that it holds, and what requests will take.

    Returns:
        The bytes, at least 0; None where the system does not say how much memory there is.
    """
    whole = cgroup.memory_bytes()
    return None if whole is None else max(whole - taken_bytes() - REQUESTS_BYTES, 0)


def max_connections() -> int:
    """Return how many connections a server of this process may have: half of the files that it may open, and no more.

    The other half is left for all else.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MAX_CONNECTIONS, files // 2) if files != resource.RLIM_INFINITY else MAX_CONNECTIONS


def shown_bytes(count: int) -> str:
    """Return a number of bytes as people read it, such as "2.50 GiB"."""
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
