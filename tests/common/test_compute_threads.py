"""Who takes how many cores; in a process of its own, since the number is the process's."""

import subprocess
import sys

CORES = """
import torch
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(3)
from spectrumkv.common.compute_threads import one_core_from_now_on, take_all_cores
model, coder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
one_core_from_now_on()
model.submit(take_all_cores).result()
one_core_from_now_on()
for thread in (model, coder):
    print(thread.submit(torch.get_num_threads).result())
print(torch.get_num_threads())
"""


def test_the_model_keeps_its_cores_and_others_have_one() -> None:
    run = subprocess.run([sys.executable, "-c", CORES], capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.split() == ["3", "1", "1"]
