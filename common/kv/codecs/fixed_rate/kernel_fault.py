"""Says whether kernels code in fixed_rate on this process's GPU, or loops of the CPU since kernels were found wrong.

A service finds out once, before it is ready (`self_check`). Until then, and where no fault was found, kernels code.
"""

import logging

import torch

logger = logging.getLogger(__name__)

_found: list[str] = []


def kernels_code(device: torch.device) -> bool:
    """Return whether kernels code on a device.

    Args:
        device: that keys and values are on.
    """
    return device.type == "cuda" and not _found


def kernel_fault() -> str:
    """Return what is wrong with the kernels on this process's GPU; nothing where they are right or not checked."""
    return _found[0] if _found else ""


def note_fault(fault: str) -> None:
    """Have loops of the CPU code from now on, and log why; the first fault is the one that is kept.

    Args:
        fault: what is wrong, a clause.
    """
    if not _found:
        logger.warning("codec fixed_rate runs on the CPU, since its kernels fail on this GPU: %s", fault)
        _found.append(fault)
