"""Reads what a container or a service unit may use of its machine: the limits of its control groups on Linux.

The kernel ends a process that takes more memory than its group has, and stops one that has used its share of the
processors until the next period. Neither limit shows in the machine's own numbers. The group's files are in
/sys/fs/cgroup: one tree in version 2, one tree for each controller in version 1. A group has the limits of all
groups above it, too. In a container, the path that the kernel names may begin outside of what is mounted; then the
limits are at the mount itself.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the bytes that this process's groups may take together; None without a limit.

    Args:
        root: the directory that holds `proc` and `sys`.
    """
    texts = [
        file.read_text().strip()
        for group, name in _groups(root, "memory", "memory.max", "memory.limit_in_bytes")
        if (file := group / name).is_file()
    ]
    # Version 2 writes "max" for no limit, version 1 a number close to 2^63.
    return min((int(text) for text in texts if text.isdecimal() and int(text) < 1 << 62), default=None)


def memory_bytes() -> int | None:
    """Return the memory that this process may use in bytes: the machine's, or its container's where that is less.

    Returns:
        The bytes; None where the system does not say.
    """
    known = [memory_limit()]
    with suppress(AttributeError, ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((one for one in known if one is not None), default=None)


def processor_limit(root: Path = ROOT) -> int | None:
    """Return how many processors this process's groups may keep busy, rounded up; None without a limit.

    Args:
        root: the directory that holds `proc` and `sys`.
    """
    shares = []
    for group, name in _groups(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        if not (group / name).is_file():
            continue
        words = (group / name).read_text().split()
        if name == "cpu.cfs_quota_us" and (group / "cpu.cfs_period_us").is_file():
            words += (group / "cpu.cfs_period_us").read_text().split()
        # No quota is "max" in version 2 and -1 in version 1.
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            shares.append(math.ceil(int(words[0]) / int(words[1])))
    return min(shares, default=None)


def _groups(root: Path, controller: str, name: str, name_in_version_1: str) -> Iterator[tuple[Path, str]]:
    """Yield the directories of this process's groups and of all above them, with the name of a limit's file there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, file = root / "sys/fs/cgroup", name
        elif controller in controllers.split(","):
            mount, file = root / "sys/fs/cgroup" / controller, name_in_version_1
        else:
            continue
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            yield group, file
            group = group.parent
