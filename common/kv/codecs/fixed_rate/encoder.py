"""Turns a prompt's layers into segments, one after another, within a budget of counted bytes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.fixed_rate.block_codec import (
    WORD_BYTES,
    Block,
    CodedBlock,
    LayerSteps,
    encode_block,
)
from spectrumkv.common.kv.codecs.fixed_rate.rate import LayerDemand, RateControl, StepSearch
from spectrumkv.common.kv.codecs.fixed_rate.statistics import measure
from spectrumkv.common.kv.codecs.fixed_rate.tiers import record_tiers, tier_bytes
from spectrumkv.common.kv.codecs.fixed_rate.transform import layer_transforms
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.importance import affordable_sinks, step_octaves
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER, KvSegment
from spectrumkv.common.kv.tiers import tier_map_bytes
from spectrumkv.kernels.absmax import halves_are_finite
from spectrumkv.kernels.fixed_rate.dispatch import analyse
from spectrumkv.kernels.fixed_rate.layout import HIGHEST_CLASS, LOWEST_CLASS, PROFILES

# Step classes per octave of a token's step. Steps differ less than attention says: what the last queries look at is
# not all that later ones will.
CLASSES_PER_OCTAVE = 2
TRUSTED_ATTENTION = 0.85
# First tokens that are sent in the 16-bit dtype. Others that are unlike the rest have gains and escapes.
SINKS = 1
# Share of a chunk that a segment is planned to fill; layers differ.
PLANNED_FILL = 0.6
# Largest share of a block's bytes that spreads and means of its own may take.
OWN_SCALES_SHARE = 0.1
# Fraction of the budget that the last layer may leave unused.
MAY_BE_LEFT = 0.0005


class _CodedLayer(NamedTuple):
    """The segments of a layer, the words of their records, and their escapes."""

    segments: list[KvSegment]
    words: int
    escapes: int

    @property
    def wire_bytes(self) -> int:
        return sum(segment.wire_bytes for segment in self.segments)

    @property
    def is_too_large(self) -> bool:
        return any(segment.wire_bytes > MAX_CHUNK_PAYLOAD_BYTES for segment in self.segments)


class FixedRateEncoder:
    """A `KvEncoder` that codes the layers of one prompt in their order.

    Args:
        basis: of the model.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        segment_bytes: for all layers' segments, headers and tier maps included. What is too little even for the
            coarsest steps is exceeded.
        scorer: name of the scorer that ranks tokens.
        seed: for scorers that draw.
    """

    def __init__(
        self, basis: SpectralBasis, geometry: KvGeometry, tokens: int, segment_bytes: int, scorer: str, seed: int
    ) -> None:
        basis.check_fits(geometry)
        self._basis = basis
        self._transforms = layer_transforms(basis)
        self._geometry = geometry
        self._scorer = scorer
        self._seed = seed
        self._tokens = tokens
        self._rate = RateControl(segment_bytes, self._transforms)
        self._sink_count = min(SINKS, affordable_sinks(segment_bytes, geometry))
        self._token_bytes = max(1.0, segment_bytes / (geometry.layers * tokens))
        self._block_tokens = max(1, int(PLANNED_FILL * MAX_CHUNK_PAYLOAD_BYTES / self._token_bytes))

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Code a layer; see `KvEncoder.encode`.

        Args:
            capture: the layer.

        Yields:
            Its segments.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large for the codec.
        """
        coded = self._layer(capture)
        while coded.is_too_large and self._block_tokens > 1:
            # This layer takes more than others. Later ones may, too.
            self._block_tokens = -(-self._block_tokens // 2)
            coded = self._layer(capture)
        self._rate.account(coded.wire_bytes, coded.words, coded.escapes)
        yield from coded.segments

    def _layer(self, capture: LayerCapture) -> _CodedLayer:
        blocks, rate = self._blocks(capture), self._rate
        demand = _demand(blocks)
        rate.observe(demand)
        if rate.is_last:
            return self._fit(blocks, demand)
        return _coded(blocks, LayerSteps(rate.base(demand), capture.tokens))

    def _blocks(self, capture: LayerCapture) -> list[Block]:
        octaves = step_octaves(capture, self._basis, self._scorer, self._seed, self._sink_count)
        classes = np.clip(
            np.rint(CLASSES_PER_OCTAVE * TRUSTED_ATTENTION * octaves), LOWEST_CLASS, HIGHEST_CLASS
        ).astype(np.int64)
        size = self._block_tokens
        return [
            self._block(capture, classes, first, min(first + size, len(classes)))
            for first in range(0, len(classes), size)
        ]

    def _block(self, capture: LayerCapture, classes: np.ndarray, first: int, end: int) -> Block:
        """Transform a run of tokens.

        Returns:
            The block.
        """
        transform = self._transforms[capture.layer]
        count = min(max(0, self._sink_count - first), end - first)
        coded = slice(first + count, end)
        keys, values = capture.keys[:, coded], capture.values[:, coded]
        sinks = self._sinks(capture, slice(first, first + count))
        rows = transform.rows
        if not keys.shape[1]:
            return Block(transform, first, sinks, count, torch.empty(0, rows), classes[coded], None)
        analysis = transform.analysis(coded.start, keys.shape[1])
        coefficients, energy = analyse(keys, values, analysis, transform.inverse_std)
        _check_finite(capture, energy)
        block_bytes = self._token_bytes * keys.shape[1]
        own = 2 * rows <= OWN_SCALES_SHARE * block_bytes
        statistics = measure(coefficients, energy, transform.std, own)
        return Block(transform, first, sinks, count, coefficients, classes[coded], statistics)

    def _sinks(self, capture: LayerCapture, span: slice) -> np.ndarray:
        """Return tokens in the 16-bit dtype, as bytes: uint8 `[b]`.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element does not fit that dtype.
        """
        states = torch.stack([capture.keys[:, span], capture.values[:, span]]).cpu()
        exact = states.to(self._geometry.half_dtype).reshape(-1).view(torch.uint8)
        if not halves_are_finite(exact, self._geometry.half_dtype):
            kind = InvalidArgumentError if bool(states.isfinite().all()) else NotFiniteError
            raise kind(
                f"keys or values of the first tokens in layer {capture.layer} do not fit {self._geometry.half_dtype}"
            )
        found: np.ndarray = exact.numpy()
        return found

    def _fit(self, blocks: Sequence[Block], demand: LayerDemand) -> _CodedLayer:
        """Return the last layer, coded with steps that take what is left of the budget and no more."""
        rate = self._rate
        steps = last_steps(blocks, demand, rate.expected_words(demand))
        search = StepSearch(self._tokens, rate.left_bytes, MAY_BE_LEFT * rate.segment_bytes)
        coded = best = _coded(blocks, steps)
        while not search.tried(steps, coded.wire_bytes):
            # All but the records is known now, and hardly changes with the steps.
            others = coded.wire_bytes - WORD_BYTES * coded.words
            steps = search.next_steps(last_steps(blocks, demand, (rate.left_bytes - others) // WORD_BYTES))
            coded = _coded(blocks, steps)
            if rate.is_better(coded.wire_bytes, best.wire_bytes):
                best = coded
        return best


def _demand(blocks: Sequence[Block]) -> LayerDemand:
    coded = [block.statistics for block in blocks if block.statistics is not None]
    fixed = sum(SEGMENT_HEADER.size + tier_map_bytes(block.length) + block.fixed_bytes for block in blocks)
    profiles = [np.bincount(block.profiles, minlength=PROFILES) for block in blocks if block.statistics is not None]
    return LayerDemand([one.scales.group_exponents for one in coded], profiles, fixed)


def last_steps(blocks: Sequence[Block], demand: LayerDemand, words: int) -> LayerSteps:
    """Find the steps with which the last layer's records come nearest to a number of words, from below.

    Args:
        blocks: of the layer.
        demand: of the layer.
        words: that its records may take.

    Returns:
        The finest base that all tokens can have, or one finer, and up to where tokens can have that.
    """
    base = demand.finest_base(words)
    finer, end = LayerSteps(base - 1, 0), 0
    for block in blocks:
        end = block.first + block.length
        layout = block.layout(finer)
        if layout is None:
            continue
        costs = layout.words_of_profile.reshape(2, -1)
        words -= int(costs[1][block.profiles].sum())
    for block in blocks:
        layout = block.layout(finer)
        if layout is None:
            continue
        costs = layout.words_of_profile.reshape(2, -1)
        more = np.cumsum((costs[0] - costs[1])[block.profiles])
        if words < more[-1]:
            finer_tokens = int(np.searchsorted(more, words, side="right"))
            return LayerSteps(base - 1, block.first + block.sink_count + finer_tokens)
        words -= int(more[-1])
    return LayerSteps(base - 1, end)


def _coded(blocks: Sequence[Block], steps: LayerSteps) -> _CodedLayer:
    segments: list[KvSegment] = []
    words = escapes = 0
    for block in blocks:
        coded = encode_block(block, steps)
        segments.append(_segment(block, coded))
        words += coded.layout.words if coded.layout is not None else 0
        escapes += coded.escapes
    return _CodedLayer(segments, words, escapes)


def _segment(block: Block, coded: CodedBlock) -> KvSegment:
    tiers = record_tiers(coded.layout, block.transform.rows, block.sink_count)
    body = torch.frombuffer(coded.body, dtype=torch.uint8)
    shares = tier_bytes(coded.layout, tiers, len(block.sinks), body.numel())
    return KvSegment(block.transform.layer, block.first, tiers, body, shares)


def _check_finite(capture: LayerCapture, energy: torch.Tensor) -> None:
    """Refuse states whose energies are not finite.

    Raises:
        NotFiniteError: an element is infinite or NaN.
        InvalidArgumentError: an element is too large.
    """
    if bool(energy.isfinite().all()):
        return
    if bool(capture.keys.isfinite().all()) and bool(capture.values.isfinite().all()):
        raise InvalidArgumentError(f"keys or values of layer {capture.layer} are too large for codec fixed_rate")
    raise NotFiniteError(f"keys or values of layer {capture.layer} are infinite or NaN")
