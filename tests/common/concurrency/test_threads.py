"""Who takes how many cores; in a process of its own, since the number is the process's."""

import os
import subprocess
import sys

import pytest

CORES = """
import torch
from concurrent.futures import ThreadPoolExecutor
from spectrumkv.common.concurrency.threads import keep_all_cores, use_one_thread
print(torch.get_num_threads())
model, coder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
model.submit(keep_all_cores).result()
use_one_thread()
for thread in (model, coder):
    print(thread.submit(torch.get_num_threads).result())
print(torch.get_num_threads())
"""


def test_the_model_keeps_its_cores_and_others_have_one() -> None:
    command = [sys.executable, "-c", CORES]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    cores, model, coder, caller = run.stdout.split()
    assert (model, coder, caller) == (cores, "1", "1")


THREADS = """
import os
import time
import torch
from spectrumkv.common.concurrency.threads import run_in_thread

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(1 << 22).add(1)
    return threads()

before = threads()
during = run_in_thread(compute)
until = time.monotonic() + 30
# Threads end after whoever had them.
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)
print(before, during, threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_work_run_in_a_thread_leaves_no_threads() -> None:
    command, environment = [sys.executable, "-c", THREADS], os.environ | {"OMP_NUM_THREADS": "4"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    before, during, after = map(int, run.stdout.split())
    assert during > before + 1
    assert after == before
