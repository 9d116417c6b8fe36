"""A prompt's layers to blocks, one after another, within a budget of counted bytes."""

from collections.abc import Iterator

import numpy as np
import torch

from spectrumkv.common.kv.codecs.spectral.accounting import class_bits, tier_bytes, token_tiers
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.importance import affordable_sinks, step_octaves
from spectrumkv.common.kv.codecs.spectral.layout import CLASSES_PER_OCTAVE, HIGHEST_CLASS, LOWEST_CLASS
from spectrumkv.common.kv.codecs.spectral.rate import BaseSearch, RateControl
from spectrumkv.common.kv.codecs.spectral.segment_codec import UncodedBlock, encode_block
from spectrumkv.common.kv.codecs.spectral.steps import TokenClasses
from spectrumkv.common.kv.codecs.spectral.transform import layer_transforms
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import Observation
from spectrumkv.common.kv.segment import BLOCK_HEADER, MAX_CHUNK_PAYLOAD_BYTES, Block
from spectrumkv.common.kv.tiers import tier_map_bytes

# Length fields and headers of one block's streams, about.
STREAM_OVERHEAD_BYTES = 300
# Share of a chunk that a block is planned to fill; what comes out differs.
PLANNED_FILL = 0.6


class SpectralEncoder:
    """Codes the layers of one prompt in their order.

    Args:
        basis: of the model.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        budget_bytes: for all layers' blocks, headers and tier maps included. What is too little even for the coarsest
            steps is exceeded.
        scorer: name of the scorer that ranks tokens.
    """

    def __init__(
        self, basis: SpectralBasis, geometry: KvGeometry, tokens: int, budget_bytes: int, scorer: str
    ) -> None:
        basis.check_fits(geometry)
        self._basis = basis
        self._transforms = layer_transforms(basis)
        self._geometry = geometry
        self._scorer = scorer
        self._rate = RateControl(budget_bytes, basis)
        self._sinks = affordable_sinks(budget_bytes, geometry)
        planned = max(1.0, budget_bytes / (geometry.layers * tokens))
        self._block_tokens = max(1, int(PLANNED_FILL * MAX_CHUNK_PAYLOAD_BYTES / planned))

    def encode(self, observation: Observation) -> Iterator[Block]:
        """See `KvEncoder.encode`.

        Raises:
            InvalidArgumentError: an element is infinite or NaN.
        """
        classes = self._step_classes(observation)
        layer = self._split(observation, classes)
        base = self._rate.base(classes[self._sinks :], self._fixed_bytes)
        blocks = self._blocks(layer, base)
        if self._rate.done == self._geometry.layers - 1:
            blocks = self._fit(layer, base, blocks)
        expected = self._rate.expected_bytes(classes[self._sinks :], base, self._fixed_bytes)
        self._rate.account(_wire_bytes(blocks), expected)
        yield from blocks

    def _split(self, observation: Observation, classes: np.ndarray) -> list[UncodedBlock]:
        transform = self._transforms[observation.layer]
        keys, values = observation.keys.cpu(), observation.values.cpu()
        layer = []
        for first in range(0, len(classes), self._block_tokens):
            span = slice(first, first + self._block_tokens)
            tokens = TokenClasses(classes[span], self._sinks if first == 0 else 0)
            layer.append(UncodedBlock(transform, first, keys[:, span], values[:, span], tokens))
        return layer

    @property
    def _fixed_bytes(self) -> int:
        """What a layer takes whatever its steps."""
        return self._sinks * self._geometry.fp16_bytes_per_layer(1) + STREAM_OVERHEAD_BYTES

    def _step_classes(self, observation: Observation) -> np.ndarray:
        """Step class of each token: int64 `[n]`."""
        octaves = step_octaves(observation, self._basis, self._scorer, self._sinks)
        classes: np.ndarray = np.clip(np.rint(CLASSES_PER_OCTAVE * octaves), LOWEST_CLASS, HIGHEST_CLASS)
        return classes.astype(np.int64)

    def _blocks(self, layer: list[UncodedBlock], base: float) -> list[Block]:
        return [coded for block in layer for coded in self._code(block, base)]

    def _code(self, block: UncodedBlock, base: float) -> Iterator[Block]:
        """One block, or two halves of one that does not fit a chunk."""
        body, steps = encode_block(block, base, self._geometry)
        if len(body) + BLOCK_HEADER.size + tier_map_bytes(block.length) > MAX_CHUNK_PAYLOAD_BYTES:
            for half in block.halves():
                yield from self._code(half, base)
            return
        coded = torch.frombuffer(body, dtype=torch.uint8)
        bits = class_bits(block.transform, steps.base)
        tiers = token_tiers(bits, block.tokens)
        shares = tier_bytes(bits, block.tokens, tiers, len(body))
        yield Block(block.transform.layer, block.first, tiers, coded, shares)

    def _fit(self, layer: list[UncodedBlock], base: float, blocks: list[Block]) -> list[Block]:
        """Code the last layer with other steps until it takes what is left of the budget and no more."""
        symbols = sum(block.length for block in layer) * self._geometry.elements_per_token_layer
        rate = self._rate
        search = BaseSearch(rate.left_bytes, rate.may_be_left, symbols, rate.finest, rate.coarsest)
        best: list[Block] | None = None
        while not search.tried(base, _wire_bytes(blocks)):
            if search.is_best(base):
                best = blocks
            base = search.next_base()
            blocks = self._blocks(layer, base)
        return blocks if search.is_best(base) or best is None else best


def _wire_bytes(blocks: list[Block]) -> int:
    return sum(block.wire_bytes for block in blocks)
