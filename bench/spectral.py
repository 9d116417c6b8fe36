"""The spectral codec, measured over real bytes before the services speak it: a baseline of the bench."""

import torch

from spectrumkv.bench.baselines import baseline
from spectrumkv.bench.served_model import Prompt, SentBytes
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.spectral.decoder import SpectralDecoder
from spectrumkv.common.kv.spectral.encoder import SpectralEncoder
from spectrumkv.common.kv.tiers import nominal_budget
from spectrumkv.decode_server.slots import Reservation, SlotArena

NAME = "spectral"


@baseline(NAME, codec=NAME, min_budget=0.05, max_budget=1.0)
def spectral(prompt: Prompt, arena: SlotArena, reservation: Reservation, budget: float) -> SentBytes:
    """Transform coding within a counted budget; block headers and tier maps count, message framing does not."""
    if prompt.basis is None:
        raise FailedPreconditionError("the model has no spectral basis; prepare the bench with one")
    encoder = SpectralEncoder(prompt.basis, arena.geometry, len(prompt.token_ids), budget)
    decoder = SpectralDecoder(prompt.basis, arena.geometry)
    counted, tiers = 0, []
    for layer in prompt.captured.layers:
        for block in encoder.encode(layer):
            first, end = block.first_token, block.first_token + block.tiers.numel()
            keys, values = (states(block.layer, first, end) for states in (reservation.keys, reservation.values))
            decoder.decode(block, keys, values)
            counted += len(block.header()) + block.body.numel()
            tiers.append(block.tiers)
    return SentBytes(counted, nominal_budget(torch.cat(tiers)))
