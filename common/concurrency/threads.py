"""How many cores torch's operations take: all of them on the thread that runs the model, one elsewhere.

What codes, sends and receives KV runs beside the model. Where it takes several cores it gains nothing, since they are
busy, and its threads wait for each other: processor time that the model could have had (ADR 47, docs/adr).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def keep_all_cores() -> None:
    """The calling thread keeps the cores that torch was started with, whatever is said later of threads to come.

    A thread gets the process's number when it first computes or asks, so asking is enough. Setting it to more than
    one would turn MKL's dynamic threads off, and MKL's LU of a batch of large matrices fails then (torch 2.13).
    """
    torch.get_num_threads()


def use_one_thread() -> None:
    """The calling thread, and all that did not compute yet, take one core."""
    torch.set_num_threads(1)


def run_in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, done on a thread that ends with it.

    Threads of libgomp wait for the next loop by spinning only while there are no more of them than cores, and whoever
    computes on several cores has threads of its own until it ends. Where a process does apart what it does before
    it serves, the model's thread is the only one that has (docs/adr/0051-spin-option.md).
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(work).result()
