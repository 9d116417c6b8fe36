"""How many cores torch's operations take: all of them on the thread that runs the model, one elsewhere.

What codes, sends and receives KV runs beside the model. Where it takes several cores it gains nothing, since they are
busy, and its threads wait for each other: processor time that the model could have had (docs/decisions.md, 46).
"""

import torch

# What torch was started with: cores, or OMP_NUM_THREADS.
_ALL = torch.get_num_threads()


def take_all_cores() -> None:
    """The calling thread takes all cores, whatever is said of others later.

    torch gives a thread the process's number when it first computes or asks; until that is said anew, others get it
    too.
    """
    torch.set_num_threads(_ALL)
    torch.get_num_threads()


def one_core_from_now_on() -> None:
    """The calling thread, and all that did not compute yet, take one core."""
    torch.set_num_threads(1)
