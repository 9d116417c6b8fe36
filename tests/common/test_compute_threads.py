"""Who takes how many cores; in a process of its own, since the number is the process's."""

import subprocess
import sys

import pytest

CORES = """
import os, threading, torch
torch.set_num_threads(3)
from concurrent.futures import ThreadPoolExecutor
from spectrumkv.common.compute_threads import give_way_from_now_on, take_all_cores, one_core_from_now_on
model, coder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
def seen():
    return torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
one_core_from_now_on()
model.submit(take_all_cores).result()
own = seen()[1]
one_core_from_now_on()
give_way_from_now_on()
for threads, niceness in (model.submit(seen).result(), coder.submit(seen).result(), seen()):
    print(threads, niceness - own)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux")
def test_the_model_keeps_its_cores_and_others_have_one_and_give_way() -> None:
    run = subprocess.run([sys.executable, "-c", CORES], capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.split("\n")[:3] == ["3 0", "1 10", "1 10"]
