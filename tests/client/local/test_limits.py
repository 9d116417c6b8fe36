"""`spectrumkv up` in a container: its services heed the limits of the control group, as their own commands do.

The group's files are made up, and read by every process that the tests start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectrumkv.client.local.pair_config import DECODE_MODULE, FREE_PORTS, PREFILL_MODULE
from tests.common.service.test_cgroup import machine
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
    done = run(machine(tmp_path, "0::/a\n", **{"a/cpu.max": quota}), "-c", STAND_IN, module, "--listen=x")
    assert done.stdout == f"{threads} --listen=x\n", done.stderr


@pytest.mark.slow
def test_kv_memory_beyond_the_groups_memory_is_refused_with_a_sentence(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", **{"a/memory.max": str(512 << 20), "cpu.max": "50000 100000"})
    options = {"model": str(tiny_model("llama")), "device": "cpu", "int4": "on", "kv-memory": "1GiB"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**FREE_PORTS, **options}.items()]
    done = run(root, "-m", "spectrumkv.client.cli.main", "up", *flags)
    assert done.returncode == 1
    assert "the decode service ended with status 1" in done.stderr
    assert "--kv-memory" in done.stderr.splitlines()[-1]
    assert "536870912" in done.stderr.splitlines()[-1]
