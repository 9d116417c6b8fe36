"""A prompt's layers to blocks, one after another, within a budget of counted bytes."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.block import BLOCK_HEADER, MAX_CHUNK_PAYLOAD_BYTES, Block
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import Observation, observed_attention, scorers
from spectrumkv.common.kv.spectral.basis import SpectralBasis
from spectrumkv.common.kv.spectral.block_codec import AnalysedLayer, Steps, encode_block
from spectrumkv.common.kv.spectral.layout import (
    CLASSES_PER_OCTAVE,
    HIGHEST_CLASS,
    LOWEST_CLASS,
    STEP_CLASSES,
    expected_bits,
)
from spectrumkv.common.kv.spectral.rate import BaseSearch, RateControl
from spectrumkv.common.kv.spectral.transform import LayerTransform, layer_transforms
from spectrumkv.common.kv.tiers import Tier, tier_map_bytes

# A step goes with this power of a token's sensitivity: at equal slope of distortion against rate, errors times
# sensitivity are alike everywhere.
SENSITIVITY_POWER = 0.5
SINKS = 4
# Length fields and headers of one block's streams, about.
STREAM_OVERHEAD_BYTES = 300
# Share of a chunk that a block is planned to fill; what comes out differs.
PLANNED_FILL = 0.6
# Mean bits an element up to which a token counts as INT4, and as INT8.
INT4_BITS, INT8_BITS = 6.0, 12.0


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
        # Sinks may take a quarter of the budget.
        sinks_affordable = budget_bytes // (4 * geometry.fp16_bytes(1))
        self._sinks = min(SINKS, max(0, sinks_affordable))
        planned = max(1.0, budget_bytes / (geometry.layers * tokens))
        self._block_tokens = max(1, int(PLANNED_FILL * MAX_CHUNK_PAYLOAD_BYTES / planned))

    def encode(self, observation: Observation) -> Iterator[Block]:
        """See `KvEncoder.encode`.

        Raises:
            InvalidArgumentError: an element is infinite or NaN.
        """
        transform = self._transforms[observation.layer]
        layer = AnalysedLayer.of(transform, observation.keys.cpu(), observation.values.cpu())
        classes = self._step_classes(observation)
        base = self._base(layer, classes)
        blocks = self._blocks(layer, classes, base)
        if self._rate.done == self._geometry.layers - 1:
            blocks = self._fit(layer, classes, base, blocks)
        expected = self._rate.expected_bytes(classes[self._sinks :], base, self._fixed_bytes)
        self._rate.account(_wire_bytes(blocks), expected)
        yield from blocks

    def _base(self, layer: AnalysedLayer, classes: np.ndarray) -> float:
        wanted = self._rate.base(classes[self._sinks :], self._fixed_bytes)
        return float(np.float32(max(wanted, layer.finest_base)))

    def _finest(self, layer: AnalysedLayer) -> float:
        return max(self._rate.finest, layer.finest_base)

    @property
    def _fixed_bytes(self) -> int:
        """What a layer takes whatever its steps."""
        return self._sinks * self._geometry.fp16_bytes_per_layer(1) + STREAM_OVERHEAD_BYTES

    def _step_classes(self, observation: Observation) -> np.ndarray:
        """Step class of each token: finer by its share of the layer's attention.

        Sensitivities were calibrated by observed attention. A scorer that measures something else decides who gets
        the largest share, the next largest, and so on.
        """
        shares = observed_attention(observation).mean(dim=0)
        if not shares.isfinite().all():
            raise InvalidArgumentError(f"keys or queries of layer {observation.layer} are infinite or NaN")
        if self._scorer != "attention":
            ranking = scorers.get(self._scorer)(observation).argsort(descending=True, stable=True)
            shares[ranking] = shares.sort(descending=True).values
        attention = shares.clamp_min(1e-7).log2().cpu().numpy()
        exponent = -SENSITIVITY_POWER * float(self._basis.attention_exponent[observation.layer])
        others = attention[self._sinks :]
        octaves = exponent * (attention - (others.mean() if len(others) else 0.0))
        classes: np.ndarray = np.clip(np.rint(CLASSES_PER_OCTAVE * octaves), LOWEST_CLASS, HIGHEST_CLASS)
        return classes.astype(np.int64)

    def _blocks(self, layer: AnalysedLayer, classes: np.ndarray, base: float) -> list[Block]:
        starts = range(0, layer.tokens, self._block_tokens)
        spans = [(first, min(first + self._block_tokens, layer.tokens)) for first in starts]
        return [block for first, end in spans for block in self._block(layer, first, end, classes, base)]

    def _block(self, layer: AnalysedLayer, first: int, end: int, classes: np.ndarray, base: float) -> Iterator[Block]:
        """One block, or two halves of one that does not fit a chunk."""
        steps = Steps(base, classes[first:end].copy(), self._sinks if first == 0 else 0)
        # Sinks have no step; the decoder sees class 0 for them.
        steps.classes[: steps.sinks] = 0
        body = encode_block(layer, first, steps, self._geometry)
        if len(body) + BLOCK_HEADER.size + tier_map_bytes(end - first) > MAX_CHUNK_PAYLOAD_BYTES:
            half = (first + end) // 2
            yield from self._block(layer, first, half, classes, base)
            yield from self._block(layer, half, end, classes, base)
            return
        coded = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        tiers = token_tiers(layer.transform, steps)
        yield Block(layer.transform.layer, first, tiers, coded, tier_bytes(layer.transform, steps, tiers, len(body)))

    def _fit(self, layer: AnalysedLayer, classes: np.ndarray, base: float, blocks: list[Block]) -> list[Block]:
        """Code the last layer with other steps until it takes what is left of the budget and no more."""
        symbols = layer.tokens * self._geometry.elements_per_token_layer
        search = BaseSearch(self._rate.left_bytes, symbols, self._finest(layer), self._rate.coarsest)
        best: list[Block] | None = None
        while not search.tried(base, _wire_bytes(blocks)):
            if search.is_best(base):
                best = blocks
            base = search.next_base()
            blocks = self._blocks(layer, classes, base)
        return blocks if search.is_best(base) or best is None else best


def token_tiers(transform: LayerTransform, steps: Steps) -> torch.Tensor:
    """The tier whose width is nearest to each token's mean bits: uint8 `[n]`."""
    bits = _mean_bits(transform, steps)
    tiers = np.where(bits <= INT4_BITS, Tier.INT4, np.where(bits <= INT8_BITS, Tier.INT8, Tier.FP16))
    tiers[: steps.sinks] = Tier.FP16
    return torch.from_numpy(tiers.astype(np.uint8))


def tier_bytes(transform: LayerTransform, steps: Steps, tiers: torch.Tensor, body_bytes: int) -> Mapping[Tier, int]:
    """How a body's bytes divide among the tiers: by expected bits, which is as well as one entropy coder tells."""
    bits = np.maximum(_mean_bits(transform, steps), 1e-3)
    bits[: steps.sinks] = 16.0
    weights = {tier: float(bits[tiers.numpy() == tier].sum()) for tier in (Tier.INT4, Tier.INT8, Tier.FP16)}
    total = sum(weights.values())
    shares = {tier: int(body_bytes * weight / total) for tier, weight in weights.items()}
    widest = max(shares, key=lambda tier: shares[tier])
    shares[widest] += body_bytes - sum(shares.values())
    return shares


def _mean_bits(transform: LayerTransform, steps: Steps) -> np.ndarray:
    """Expected bits an element of each token: float64 `[n]`."""
    exponents = (transform.run_classes[None, :] - STEP_CLASSES[:, None]) / CLASSES_PER_OCTAVE - steps.base
    widths = np.diff(transform.run_start)
    means: np.ndarray = (expected_bits(exponents) @ widths / widths.sum())[steps.classes - LOWEST_CLASS]
    return means


def _wire_bytes(blocks: list[Block]) -> int:
    """What blocks take of the budget, headers and tier maps included."""
    return sum(len(block.header()) + block.body.numel() for block in blocks)
