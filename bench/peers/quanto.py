"""Run transformers' QuantizedCache with the quanto backend as baselines, and look after quanto's compiled kernels.

The layers of a QuantizedCache quantize all of a prompt's KV after the prompt has run, asymmetrically, in groups of 64
with a scale and a zero point each. What they read back at the next step is what decode would receive. Bytes: the
codes, and 16 bits for each scale and each zero point (on a CPU quanto keeps them in float32, which nobody would
send).

quanto lets torch compile an extension when it first unpacks a tensor. torch creates a file named `lock` in the build
folder whenever it compiles or loads the extension, and waits as long as such a file is there. If a process is killed
meanwhile, its lock stays, and every later process would wait for it without a message.
"""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F
from transformers.cache_utils import QuantoQuantizedLayer

from spectrumkv.bench.methods.method import Prompt, SentBytes
from spectrumkv.bench.peers.baselines import baseline, coded_bytes
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.decode_server.kv_pool import Allocation, KvPool

# The module that shows whether quanto is installed.
QUANTO = "optimum.quanto"

# Extensions by kind of device; a GPU has the one that torch was built for. Without these quanto compiles nothing.
EXTENSIONS = {"cpu": ("quanto_cpp",), "cuda": ("quanto_cuda", "quanto_hip")}
# Another process may hold the lock while it loads a built extension, which takes a fraction of a second.
LOADING_SECONDS = 5.0
LOOK_SECONDS = 0.05
GROUP_SIZE = 64
NUMBERS_PER_GROUP = 2
# quanto's axes: groups of one token's neighbouring elements, or of one channel's neighbouring tokens.
PER_TOKEN, PER_CHANNEL = 0, -1


@baseline("quanto-4bit", codec="quanto", min_budget=0.25, requires=QUANTO)
def quanto_4bit(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Return what sending 4 bits took, grouped along the token: the default settings of QuantizedCache."""
    return _send(prompt, allocation, bits=4, axis_key=PER_TOKEN)


@baseline("quanto-2bit", codec="quanto", min_budget=0.125, requires=QUANTO)
def quanto_2bit(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Return what sending 2 bits took, grouped along the token: otherwise the default settings of QuantizedCache."""
    return _send(prompt, allocation, bits=2, axis_key=PER_TOKEN)


@baseline("quanto-4bit-kivi", codec="quanto", min_budget=0.25, requires=QUANTO)
def quanto_4bit_kivi(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Quantize to 4 bits, keys grouped along the channel (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3).

    Returns:
        The counted bytes and the tier budget.
    """
    return _send(prompt, allocation, bits=4, axis_key=PER_CHANNEL)


@baseline("quanto-2bit-kivi", codec="quanto", min_budget=0.125, requires=QUANTO)
def quanto_2bit_kivi(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Quantize to 2 bits, keys grouped along the channel (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3).

    Returns:
        The counted bytes and the tier budget.
    """
    return _send(prompt, allocation, bits=2, axis_key=PER_CHANNEL)


def _send(prompt: Prompt, allocation: Allocation, bits: int, axis_key: int) -> SentBytes:
    counted = 0.0
    for layer in prompt.captured.layers:
        cache = QuantoQuantizedLayer(
            nbits=bits, axis_key=axis_key, axis_value=PER_TOKEN, q_group_size=GROUP_SIZE, residual_length=GROUP_SIZE
        )
        keys, values = _whole_groups(layer.keys), _whole_groups(layer.values)
        cache.update(keys[None], values[None])
        # Adding one more token returns the dequantized others.
        read_keys, read_values = cache.update(keys[None, :, :1], values[None, :, :1])
        allocation.keys(layer.layer, 0, layer.tokens).copy_(read_keys[0, :, : layer.tokens])
        allocation.values(layer.layer, 0, layer.tokens).copy_(read_values[0, :, : layer.tokens])
        elements = layer.keys.numel() + layer.values.numel()
        counted += coded_bytes(elements, bits, NUMBERS_PER_GROUP * elements // GROUP_SIZE)
    return SentBytes(counted, bits / 16)


def _whole_groups(states: torch.Tensor) -> torch.Tensor:
    """Return the states with the last token repeated to whole groups, as quanto requires; the copies do not count."""
    missing = -states.shape[1] % GROUP_SIZE
    return F.pad(states, (0, 0, 0, missing), mode="replicate") if missing else states.contiguous()


def expect_extension(device: torch.device, console: Console) -> None:
    """Check quanto's extension before something uses it.

    Args:
        device: the device that unpacks tensors.
        console: gets a line if the kernels must be compiled first.

    Raises:
        FailedPreconditionError: torch would wait for another process, which may have ended.
    """
    extension = _extension(device)
    if extension is None:
        return
    folder = Path(extension.build_directory)
    built_with = _built_with(folder)
    built = built_with == torch.__version__
    # quanto deletes a build for another torch together with its lock.
    if built or built_with is None:
        _check_lock(folder / "lock", LOADING_SECONDS if built else 0.0)
    if not built:
        console.print("quanto compiles its kernels at first use, which takes a minute", markup=False, style="dim")


def _extension(device: torch.device) -> Any:
    """Return quanto's description of the extension; None if it has none for such a device."""
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    names = [name for name in EXTENSIONS[device.type] if is_extension_available(name)]
    return get_extension(names[0]) if names else None


def _built_with(folder: Path) -> str | None:
    """Return the version of torch that the extension was built with; None if there is no build."""
    try:
        return (folder / "pytorch_version.txt").read_text(encoding="utf-8").rstrip()
    except FileNotFoundError:
        return None


def _check_lock(lock: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while lock.exists():
        if time.monotonic() >= deadline:
            raise FailedPreconditionError(
                f"{lock} is there: another process is compiling quanto's kernels now, or one was ended meanwhile; "
                "wait for that process, or delete the file if no such process runs"
            )
        time.sleep(LOOK_SECONDS)
