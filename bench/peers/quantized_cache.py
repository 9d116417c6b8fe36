"""transformers' own QuantizedCache with the quanto backend, from the optional extra `peers`.

Its layers quantize all of a prompt's KV when the prompt has run, asymmetrically, in groups of 64 with a scale and a
zero point each. What they read back at the next step is what decode would receive. Bytes: the codes, and 16 bits for
each scale and each zero point (on a CPU quanto keeps them in float32; nobody would send that).
"""

import torch
from torch.nn import functional as F
from transformers.cache_utils import QuantoQuantizedLayer

from spectrumkv.bench.methods.served_model import Prompt, SentBytes
from spectrumkv.bench.peers.baselines import baseline, coded_bytes
from spectrumkv.bench.peers.quanto_extension import QUANTO
from spectrumkv.decode_server.kv_pool import Allocation, KvPool

GROUP_SIZE = 64
NUMBERS_PER_GROUP = 2
# quanto's axes: groups of one token's neighbouring elements, or of one channel's neighbouring tokens.
PER_TOKEN, PER_CHANNEL = 0, -1


@baseline("quanto-4bit", codec="quanto", min_budget=0.25, requires=QUANTO)
def quanto_4bit(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """4 bits, grouped along the token: the settings that QuantizedCache has by itself."""
    return _send(prompt, allocation, bits=4, axis_key=PER_TOKEN)


@baseline("quanto-2bit", codec="quanto", min_budget=0.125, requires=QUANTO)
def quanto_2bit(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """2 bits, grouped along the token: the settings that QuantizedCache has by itself."""
    return _send(prompt, allocation, bits=2, axis_key=PER_TOKEN)


@baseline("quanto-4bit-kivi", codec="quanto", min_budget=0.25, requires=QUANTO)
def quanto_4bit_kivi(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """4 bits, keys grouped along the channel as KIVI has it (Liu et al. 2024, arXiv 2402.02750)."""
    return _send(prompt, allocation, bits=4, axis_key=PER_CHANNEL)


@baseline("quanto-2bit-kivi", codec="quanto", min_budget=0.125, requires=QUANTO)
def quanto_2bit_kivi(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """2 bits, keys grouped along the channel as KIVI has it (Liu et al. 2024, arXiv 2402.02750)."""
    return _send(prompt, allocation, bits=2, axis_key=PER_CHANNEL)


def _send(prompt: Prompt, allocation: Allocation, bits: int, axis_key: int) -> SentBytes:
    counted = 0.0
    for layer in prompt.captured.layers:
        cache = QuantoQuantizedLayer(
            nbits=bits, axis_key=axis_key, axis_value=PER_TOKEN, q_group_size=GROUP_SIZE, residual_length=GROUP_SIZE
        )
        keys, values = _whole_groups(layer.keys), _whole_groups(layer.values)
        cache.update(keys[None], values[None])
        # Reading one more token returns what was kept of the others.
        read_keys, read_values = cache.update(keys[None, :, :1], values[None, :, :1])
        allocation.keys(layer.layer, 0, layer.tokens).copy_(read_keys[0, :, : layer.tokens])
        allocation.values(layer.layer, 0, layer.tokens).copy_(read_values[0, :, : layer.tokens])
        elements = layer.keys.numel() + layer.values.numel()
        counted += coded_bytes(elements, bits, NUMBERS_PER_GROUP * elements // GROUP_SIZE)
    return SentBytes(counted, bits / 16)


def _whole_groups(states: torch.Tensor) -> torch.Tensor:
    """Repeat the last token until the tokens fill whole groups, which quanto demands; nobody counts or sees it."""
    missing = -states.shape[1] % GROUP_SIZE
    return F.pad(states, (0, 0, 0, missing), mode="replicate") if missing else states.contiguous()
