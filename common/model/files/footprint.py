"""Refuses weights that the memory cannot hold before they are read: the kernel would end the process unexplained."""

import math
from pathlib import Path

import torch
from safetensors import safe_open

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.files.directory import refuse_damage, weight_files
from spectrumkv.common.service import cgroup, machine


def weights_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Return how much memory a model's weights take; only the headers of its files are read.

    Args:
        directory: the model's.
        dtype: what the model computes in.

    Returns:
        The bytes.

    Raises:
        FailedPreconditionError: a file is missing or damaged.
    """
    count = 0
    for path in weight_files(directory):
        # "pt" maps a file for writing, which Linux refuses where it is larger than the memory; "np" maps it to read.
        with refuse_damage(f"{path.name} of the model in {directory}"), safe_open(path, framework="np") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count * dtype.itemsize


def check_weights_fit(directory: Path, dtype: torch.dtype) -> None:
    """Check that a model's weights fit into the memory that this process may still take on a CPU.

    Args:
        directory: the model's.
        dtype: what the model computes in.

    Raises:
        FailedPreconditionError: they do not, or a file is missing or damaged.
    """
    needed, there = weights_bytes(directory, dtype), machine.bytes_left()
    if there is not None and needed > there:
        named = str(dtype).removeprefix("torch.")
        raise FailedPreconditionError(
            f"the weights in {directory} take {needed} bytes as {named}, and this machine, or the control group of "
            f"this process, has {cgroup.memory_bytes()}, of which {there} are left; give the service more memory, "
            "or name a smaller model or --dtype bfloat16"
        )
