"""Turns a prompt's layers into segments, one after another, within a budget of counted bytes."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.fixed_rate.block_codec import Block, LayerSteps, encode_block
from spectrumkv.common.kv.codecs.fixed_rate.coded_layer import (
    TRUSTED_ATTENTION,
    BlockPlan,
    CodedLayer,
    demand_of,
    fit_last,
    last_steps,
    segment_of,
)
from spectrumkv.common.kv.codecs.fixed_rate.rate import RateControl
from spectrumkv.common.kv.codecs.fixed_rate.statistics import measure
from spectrumkv.common.kv.codecs.fixed_rate.transform import layer_transforms
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.importance import affordable_sinks, step_octaves
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, KvSegment
from spectrumkv.kernels.absmax import halves_are_finite
from spectrumkv.kernels.fixed_rate.dispatch import analyse
from spectrumkv.kernels.fixed_rate.layout import HIGHEST_CLASS, LOWEST_CLASS

# Step classes per octave of a token's step.
CLASSES_PER_OCTAVE = 2
# First tokens that are sent in the 16-bit dtype. Others that are unlike the rest have gains and escapes.
SINKS = 1
# Share of a chunk that a segment is planned to fill; layers differ.
PLANNED_FILL = 0.6


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
            self._block_tokens = -(-min(self._block_tokens, capture.tokens) // 2)
            coded = self._layer(capture)
        self._rate.account(coded.wire_bytes, coded.words, coded.escapes)
        yield from coded.segments

    def _layer(self, capture: LayerCapture) -> CodedLayer:
        if capture.keys.is_cuda:
            return self._on_gpu(capture)
        blocks, rate = self._blocks(capture), self._rate
        demand = demand_of(blocks)
        rate.observe(demand)
        if not rate.is_last:
            return _coded(blocks, LayerSteps(rate.base(demand), capture.tokens))
        steps = last_steps(blocks, demand, rate.expected_words(demand.fixed_bytes))
        return fit_last(blocks, demand, rate, self._tokens, steps, partial(_coded, blocks))

    def _on_gpu(self, capture: LayerCapture) -> CodedLayer:
        # Triton takes a while to import, and exists on Linux only.
        from spectrumkv.common.kv.codecs.fixed_rate.gpu.layers import GpuLayers

        layers = GpuLayers(self._basis, self._geometry, self._scorer, self._seed)
        return layers.code(capture, self._rate, self._plan)

    @property
    def _plan(self) -> BlockPlan:
        return BlockPlan(self._block_tokens, self._sink_count, self._token_bytes)

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
        own = keys.shape[1] >= self._plan.own_tokens(rows)
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


def _coded(blocks: Sequence[Block], steps: LayerSteps) -> CodedLayer:
    segments: list[KvSegment] = []
    words = escapes = 0
    for block in blocks:
        coded = encode_block(block, steps)
        segments.append(segment_of(block, torch.frombuffer(coded.body, dtype=torch.uint8), coded.layout))
        words += coded.layout.words if coded.layout is not None else 0
        escapes += coded.escapes
    return CodedLayer(segments, words, escapes)


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
