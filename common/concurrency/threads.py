"""Bounds the cores that torch's operations take: all of them on the thread that runs the model, one on other threads.

Threads that code, send and receive KV run beside the model. With several cores each they would gain nothing, because
the model keeps the cores busy, and their waiting for each other would cost processor time that the model could use
(ADR 47, docs/adr).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def keep_all_cores() -> None:
    """Let the calling thread keep the cores that torch was started with, whatever `use_one_thread` sets later.

    A thread takes over the process's number of threads when it first computes or asks for it, so asking is enough.
    Setting the number to more than one would turn MKL's dynamic threads off, and then MKL's LU of a batch of large
    matrices fails (torch 2.13).
    """
    torch.get_num_threads()


def use_one_thread() -> None:
    """Let the calling thread, and all threads that have not computed yet, take one core."""
    torch.set_num_threads(1)


def run_in_thread(work: Callable[[], T]) -> T:
    """Do some work on a thread that ends with it.

    A thread that computes on several cores starts worker threads of libgomp, which last until it ends. These wait for
    the next loop by spinning only while there are no more of them than cores. A process that does its preparations in
    such a thread leaves the model's thread as the only one with workers.

    Args:
        work: the work.

    Returns:
        What `work` returns; an exception of `work` is raised here.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(work).result()
