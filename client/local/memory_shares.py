"""Shares the memory of a machine or a container between the two services that `spectrumkv up` starts on it.

Each service alone would count on all of it: prefill on half for KV that waits, decode on its slots besides.
"""

from pathlib import Path

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.cgroup import memory_bytes
from spectrumkv.common.service.config import DecodeConfig

# What KV may take in a service where no option says it; weights, activations and libraries need the rest.
KV_SHARE = 4
# Where there is one of these, the model runs on a GPU unless an option says otherwise, and KV lies in its memory.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def kv_memory_of_both(device: str, decode_bytes: int | None, prefill_bytes: int | None) -> tuple[int, int | None]:
    """Return the memory for KV of decode and of prefill, which together have room on this machine.

    Args:
        device: where the models run, as the option names it.
        decode_bytes: what `kv_memory` says; None where it is not given.
        prefill_bytes: what `prefill_kv_memory` says; None where it is not given.

    Returns:
        The bytes of each; None leaves prefill to choose.

    Raises:
        InvalidArgumentError: what is given has no room.
    """
    there = memory_bytes()
    on_gpu = device == "cuda" or (device == "auto" and any(path.exists() for path in GPU_DEVICES))
    if there is None or on_gpu:
        return decode_bytes or DecodeConfig.kv_memory, prefill_bytes
    share = there // KV_SHARE
    decode = decode_bytes or min(DecodeConfig.kv_memory, share, (there - (prefill_bytes or 0)) // 2)
    prefill = prefill_bytes or min(share, (there - decode) // 2)
    if min(decode, prefill) <= 0 or decode + prefill > there:
        raise InvalidArgumentError(
            f"--kv-memory is {_shown(decode_bytes)} and --prefill-kv-memory is {_shown(prefill_bytes)}, and this "
            f"machine, or the control group of this process, has {there} bytes for both services; set them lower"
        )
    return decode, prefill


def _shown(given: int | None) -> str:
    return "not given" if given is None else f"{given} bytes"
