"""A process in a container learns what it may use, under both versions of control groups."""

import os
from pathlib import Path

import pytest

from spectrumkv.common.service import cgroup, entrypoints, machine
from spectrumkv.common.service.cgroup import memory_limit, processor_limit


def made_up(root: Path, groups: str, **files: str) -> Path:
    """Write the files of a machine: /proc/self/cgroup, and others by their paths below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def test_version_2_has_one_tree(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "max", "a/memory.max": "1073741824", "a/b/cpu.max": "150000 100000",
             "a/cpu.max": "max 100000"}  # fmt: skip
    root = made_up(tmp_path, "0::/a/b\n", **files)
    assert memory_limit(root) == 1 << 30
    assert processor_limit(root) == 2


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    root = made_up(tmp_path, "0::/\n", **{"memory.max": "4096", "cpu.max": "50000 100000"})
    assert (memory_limit(root), processor_limit(root)) == (4096, 1)


def test_version_1_has_a_tree_for_each_controller(tmp_path: Path) -> None:
    groups = "7:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n"
    files = {"memory/memory.limit_in_bytes": "2147483648", "cpu/docker/x/cpu.cfs_quota_us": "300000",
             "cpu/docker/x/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1",
             "cpu/cpu.cfs_period_us": "100000"}  # fmt: skip
    root = made_up(tmp_path, groups, **files)
    assert (memory_limit(root), processor_limit(root)) == (2 << 30, 3)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("", {}),
        ("0::/a\n", {"a/memory.max": "max", "a/cpu.max": "max 100000"}),
        ("3:memory:/\n2:cpu:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712",
                                   "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}),
        ("0::/../outside\n", {}),
    ],
)  # fmt: skip
def test_without_limits_there_are_none(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    root = made_up(tmp_path, groups, **files)
    assert (memory_limit(root), processor_limit(root)) == (None, None)


def test_a_machine_without_groups_has_no_limits(tmp_path: Path) -> None:
    assert (memory_limit(tmp_path), processor_limit(tmp_path)) == (None, None)


def test_the_smaller_of_machine_and_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_limit", lambda: None)
    whole = cgroup.memory_bytes()
    assert whole is not None
    monkeypatch.setattr(cgroup, "memory_limit", lambda: 1 << 30)
    assert cgroup.memory_bytes() == min(whole, 1 << 30)
    monkeypatch.setattr(cgroup, "memory_limit", lambda: whole + 1)
    assert cgroup.memory_bytes() == whole


@pytest.mark.parametrize(
    ("limit", "given", "asked", "expected"),
    [
        (1, None, None, "1"),
        (None, None, None, None),
        (9, None, None, None),
        (1, "7", None, "7"),
        (None, None, 3, "3"),
        (2, "7", 1, "1"),
    ],
)
def test_libraries_start_no_more_threads_than_there_are_processors(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, given: str | None, asked: int | None, expected: str | None
) -> None:
    monkeypatch.setattr(cgroup, "processor_limit", lambda: limit)
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_NUM_THREADS": given})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    entrypoints.limit_threads(asked)
    assert os.environ.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize(("limit", "there"), [(1, 1), (None, 4), (9, 4)])
def test_affinity_and_quota_bound_the_processors(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, there: int
) -> None:
    monkeypatch.setattr(cgroup, "processor_limit", lambda: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert machine.processors() == there


def test_what_a_process_holds_is_not_there_for_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_limit", lambda: 2 << 30)
    held = bytearray(os.urandom(1 << 20)) * 64
    taken = machine.taken_bytes()
    assert len(held) < taken < 2 << 30
    there = machine.bytes_left()
    assert there is not None
    assert 0 < there <= (2 << 30) - len(held) - machine.REQUESTS_BYTES
    monkeypatch.setattr(cgroup, "memory_limit", lambda: 1 << 20)
    assert machine.bytes_left() == 0
