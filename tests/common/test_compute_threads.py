"""Who takes how many cores; in a process of its own, since the number is the process's."""

import subprocess
import sys

CORES = """
import torch
from concurrent.futures import ThreadPoolExecutor
from spectrumkv.common.compute_threads import keep_all_cores, one_core_from_now_on
print(torch.get_num_threads())
model, coder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
model.submit(keep_all_cores).result()
one_core_from_now_on()
for thread in (model, coder):
    print(thread.submit(torch.get_num_threads).result())
print(torch.get_num_threads())
"""


def test_the_model_keeps_its_cores_and_others_have_one() -> None:
    command = [sys.executable, "-c", CORES]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    cores, model, coder, caller = run.stdout.split()
    assert (model, coder, caller) == (cores, "1", "1")
