"""How many cores torch's operations take: all of them on the thread that runs the model, one elsewhere.

What codes, sends and receives KV runs beside the model. Where it takes several cores it gains nothing, since they are
busy, and its threads wait for each other: processor time that the model could have had (docs/decisions.md, 46).
"""

import torch


def keep_all_cores() -> None:
    """The calling thread keeps the cores that torch was started with, whatever is said later of threads to come.

    A thread gets the process's number when it first computes or asks, so asking is enough. Setting it to more than
    one would turn MKL's dynamic threads off, and MKL's LU of a batch of large matrices fails then (torch 2.13).
    """
    torch.get_num_threads()


def one_core_from_now_on() -> None:
    """The calling thread, and all that did not compute yet, take one core."""
    torch.set_num_threads(1)
