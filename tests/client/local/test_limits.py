"""`spectrumkv up` in a container: its services heed the limits of the control group, as their own commands do.

The group's files are made up, and read by every process that the tests start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectrumkv.client.local import memory_shares
from spectrumkv.client.local.pair_config import DECODE_MODULE, FREE_PORTS, PREFILL_MODULE, plan_launches
from spectrumkv.client.local.service_process import ServiceLaunch
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.options import parse_bytes
from tests.common.service.test_cgroup import made_up
from tests.tiny_models import tiny_model

LIMITED = Path(__file__).parent / "limited"
# Takes the place of a service, so that nothing is loaded, and says how many threads libraries would start.
STAND_IN = """
import os, runpy, sys, types
for name in ("prefill_server", "decode_server"):
    stand_in = types.ModuleType("main")
    stand_in.main = lambda: print(os.environ.get("OMP_NUM_THREADS"), *sys.argv[1:])
    sys.modules[f"spectrumkv.{name}.main"] = stand_in
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def run(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run Python on a machine whose control groups are in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = os.pathsep.join([str(LIMITED), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        env=environment | {"PYTHONPATH": path, "MADE_UP_MACHINE": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("module", [DECODE_MODULE, PREFILL_MODULE])
@pytest.mark.parametrize(("quota", "threads"), [("50000 100000", "1"), ("max 100000", "None")])
def test_services_start_no_more_threads_than_the_quota_keeps_busy(
    tmp_path: Path, module: str, quota: str, threads: str
) -> None:
    done = run(made_up(tmp_path, "0::/a\n", **{"a/cpu.max": quota}), "-c", STAND_IN, module, "--listen=x")
    assert done.stdout == f"{threads} --listen=x\n", done.stderr


def shares(launches: tuple[ServiceLaunch, ServiceLaunch]) -> tuple[int, int]:
    """The memory for KV that the commands of decode and prefill name."""
    (decode,) = [flag for flag in launches[0].command if flag.startswith("--kv-memory=")]
    (prefill,) = [flag for flag in launches[1].command if flag.startswith("--prefill-kv-memory=")]
    return parse_bytes(decode.partition("=")[2]), parse_bytes(prefill.partition("=")[2])


CPU = {**FREE_PORTS, "device": "cpu"}


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        (1 << 30, {}, (1 << 28, 1 << 28)),
        (1 << 36, {}, (1 << 30, 1 << 34)),
        (1 << 30, {"kv_memory": "512MiB"}, (1 << 29, 1 << 28)),
        (1 << 30, {"kv_memory": "768MiB"}, (3 << 28, 1 << 27)),
        (1 << 30, {"prefill_kv_memory": "768MiB"}, (1 << 27, 3 << 28)),
        (1 << 30, {"kv_memory": "512MiB", "prefill_kv_memory": "512MiB"}, (1 << 29, 1 << 29)),
    ],
)
def test_the_services_share_the_memory_of_their_group(
    monkeypatch: pytest.MonkeyPatch, there: int, options: dict[str, str], expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(memory_shares, "memory_bytes", lambda: there)
    assert shares(plan_launches({**CPU, **options})) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"kv_memory": "1GiB"},
        {"prefill_kv_memory": "1GiB"},
        {"prefill_kv_memory": "2GiB"},
        {"kv_memory": "513MiB", "prefill_kv_memory": "512MiB"},
    ],
)
def test_more_than_there_is_for_both_is_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    monkeypatch.setattr(memory_shares, "memory_bytes", lambda: 1 << 30)
    with pytest.raises(InvalidArgumentError, match="has 1073741824 bytes for both services; set them lower"):
        plan_launches({**CPU, **options})


def test_kv_on_a_gpu_is_not_counted_as_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_shares, "memory_bytes", lambda: 1 << 30)
    monkeypatch.setattr(memory_shares, "GPU_DEVICES", (tmp_path,))
    launches = plan_launches({**FREE_PORTS, "kv_memory": "40GiB"})
    assert "--kv-memory=40GiB" in launches[0].command
    assert not any("prefill-kv-memory" in flag for flag in launches[1].command)
    with pytest.raises(InvalidArgumentError):
        plan_launches({**CPU, "kv_memory": "40GiB"})


@pytest.mark.slow
def test_kv_memory_beyond_the_groups_memory_is_refused_with_a_sentence(tmp_path: Path) -> None:
    root = made_up(tmp_path, "0::/a\n", **{"a/memory.max": str(512 << 20), "cpu.max": "50000 100000"})
    options = {"model": str(tiny_model("llama")), "device": "cpu", "int4": "on", "kv-memory": "1GiB"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**FREE_PORTS, **options}.items()]
    done = run(root, "-m", "spectrumkv.client.cli.main", "up", *flags)
    assert done.returncode == 1
    assert "--kv-memory is 1073741824 bytes" in done.stderr
    assert "has 536870912 bytes for both services" in done.stderr
