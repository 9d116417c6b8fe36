"""Which files of tests begin first where several processes share them.

pytest-xdist gives files out in the order in which they were collected, each to the process that is free next. A file
that takes minutes and comes last keeps one process busy while the others have nothing left.
"""

from collections import Counter

import pytest

# What the longest files took, in seconds, of one of two processes on two slow cores. A file that is not here begins
# after these, the sooner the more tests it has. A figure that is out of date costs some idle seconds, nothing else.
SECONDS = {
    # With all code compiled before.
    "tests/faults/matrix/test_matrix.py": 506,
    "tests/faults/test_overload.py": 296,
    "tests/faults/workers/test_broken_worker.py": 240,
    "tests/faults/soak/test_soak.py": 233,
    "tests/faults/hostile/test_hostile.py": 194,
    "tests/faults/damage/test_integrity.py": 193,
    "tests/faults/workers/test_coming_and_going.py": 189,
    "tests/faults/hostile/decoders/test_fixed_rate_bodies.py": 147,
    "tests/faults/test_hanging_up.py": 102,
    "tests/faults/damage/test_bytes.py": 68,
    "tests/faults/hostile/decoders/test_spectral_bodies.py": 56,
    "tests/faults/test_killed_parent.py": 51,
    "tests/faults/workers/test_replaced_weights.py": 47,
    "tests/faults/workers/test_rolling_restart.py": 38,
}


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests in place by their files; those of a file keep their order."""
    counts = Counter(file_of(item) for item in items)

    def rank(item: pytest.Item) -> tuple[int, int, str]:
        file = file_of(item)
        return -SECONDS.get(file, 0), -counts[file], file

    items.sort(key=rank)


def file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
