"""Codes the layers of a prompt on a GPU: the host waits once for each, and the last one until it fits the budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spectrumkv.common.errors import InternalError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.body import to_host
from spectrumkv.common.kv.codecs.fixed_rate.block_codec import (
    ESCAPE_BYTES,
    HEADER,
    WORD_BYTES,
    Block,
    LayerSteps,
    check_escapes,
    padded,
)
from spectrumkv.common.kv.codecs.fixed_rate.coded_layer import (
    MAY_BE_LEFT,
    BlockPlan,
    CodedLayer,
    demand_of,
    fit_last,
    segment_of,
)
from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis, device_basis
from spectrumkv.common.kv.codecs.fixed_rate.rate import RateControl
from spectrumkv.common.kv.codecs.fixed_rate.statistics import BlockStatistics, calibrated_scales, check_spreads
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform, layer_transforms
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.scoring import mean_attention, scorers
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES, SEGMENT_HEADER
from spectrumkv.common.kv.tiers import tier_map_bytes
from spectrumkv.kernels.fixed_rate.layout import LOWEST_CLASS, LOWEST_GAIN, RowScales
from spectrumkv.kernels.fixed_rate.triton import encode as kernels
from spectrumkv.kernels.fixed_rate.triton.blocks import (
    BLOCK_BROKEN,
    BLOCK_ESCAPES,
    BLOCK_TOP,
    BLOCK_WORDS,
    BlockShape,
)
from spectrumkv.kernels.fixed_rate.triton.memory import CodedLayer as DeviceLayer
from spectrumkv.kernels.fixed_rate.triton.memory import LayerRate, Workspace
from spectrumkv.kernels.upload import aligned

# Room for a body, relative to what it is planned to take, and bytes beside that; more is copied to the host than is
# sent.
ROOM, SPARE_BYTES = 1.7, 4096


class _RoomError(Exception):
    """A body takes more than there is room for."""


@dataclass(frozen=True)
class GpuLayers:
    """What codes the layers of one prompt.

    Attributes:
        basis: of the model.
        geometry: shape and dtype of the model's cache.
        scorer: name of the scorer that ranks tokens.
        seed: for scorers that draw.
    """

    basis: SpectralBasis
    geometry: KvGeometry
    scorer: str
    seed: int

    def code(self, capture: LayerCapture, rate: RateControl, plan: BlockPlan) -> CodedLayer:
        """Code a layer.

        Args:
            capture: the layer.
            rate: of the request.
            plan: how the layer is cut.

        Returns:
            Its segments; none where one would be too large for a chunk.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large for the codec.
        """
        planned = plan.token_bytes * min(plan.size, capture.tokens)
        if rate.is_last:
            # It takes what is left, which may be more.
            planned = max(planned, rate.left_bytes)
        least = int(ROOM * planned) + self.geometry.fp16_bytes_per_layer(plan.sinks) + SPARE_BYTES
        for room in sorted({min(aligned(least), MAX_CHUNK_PAYLOAD_BYTES), MAX_CHUNK_PAYLOAD_BYTES}):
            try:
                return self._code(capture, rate, plan, room)
            except _RoomError:
                continue
        return CodedLayer([], 0, 0)

    def _code(self, capture: LayerCapture, rate: RateControl, plan: BlockPlan, room: int) -> CodedLayer:
        on_device = device_basis(self.basis, capture.keys.device)
        transform = layer_transforms(self.basis)[capture.layer]
        shape = BlockShape(capture.tokens, plan.size, plan.sinks, plan.own_tokens(transform.rows), room)
        layer, work = self._launch(capture, rate, shape, on_device)
        host = layer.copied(to_host(layer.memory))
        self._check(capture, host)
        blocks = [self._block(transform, host, number, found) for number, found in enumerate(host.blocks)]
        steps = LayerSteps(host.base, capture.tokens)
        coded = _coded(blocks, host, steps)
        rate.drift, rate.smooth_base = host.drift, host.smooth_base
        if not rate.is_last:
            return coded

        def code(other: LayerSteps) -> CodedLayer:
            if other == steps:
                return coded
            kernels.pack_again(layer, work, other.base, other.turn, _starts(blocks, other))
            return _coded(blocks, layer.copied(to_host(layer.memory)), other)

        return fit_last(blocks, demand_of(blocks), rate, capture.tokens, steps, code)

    def _launch(
        self, capture: LayerCapture, rate: RateControl, shape: BlockShape, on_device: DeviceBasis
    ) -> tuple[DeviceLayer, Workspace]:
        """Return what the GPU will make of the layer, and do not wait for it."""
        words = rate.expected_words(_fixed_bytes(shape, 2 * self.geometry.kv_heads * self.geometry.head_dim))
        if rate.is_last:
            # The middle of what is good enough: escapes are foreseen only.
            words -= int(MAY_BE_LEFT * rate.segment_bytes / 2) // WORD_BYTES
        kind = on_device.kinds[capture.layer]
        cosine, sine = (one[kind] for one in on_device.angles(shape.tokens))
        return kernels.encode(
            capture.keys,
            capture.values,
            self._shares(capture),
            (cosine, sine),
            on_device.analysis(capture.layer),
            shape,
            LayerRate(words, rate.drift, rate.drift_weight, rate.smooth_base or 0.0, rate.base_weight),
        )

    def _shares(self, capture: LayerCapture) -> torch.Tensor:
        """Return each token's share of the attention, float32 `[n]` on the GPU; see `importance.step_octaves`."""
        shares = mean_attention(capture)
        if self.scorer == "attention":
            return shares
        ranking = scorers.get(self.scorer)(capture, self.seed).argsort(descending=True, stable=True)
        return torch.empty_like(shares).scatter_(0, ranking, shares.sort(descending=True).values)

    def _check(self, capture: LayerCapture, host: DeviceLayer) -> None:
        """Refuse a layer of which something is not finite.

        Raises:
            NotFiniteError: an element is infinite or NaN.
            InvalidArgumentError: an element is too large.
        """
        if host.broken_scores:
            raise NotFiniteError(f"keys or queries of layer {capture.layer} are infinite or NaN")
        if not any(found[BLOCK_BROKEN] for found in host.blocks):
            return
        if bool(capture.keys.isfinite().all()) and bool(capture.values.isfinite().all()):
            raise InvalidArgumentError(
                f"keys or values of layer {capture.layer} are too large for codec fixed_rate, or those of the first "
                f"tokens for {self.geometry.half_dtype}"
            )
        raise NotFiniteError(f"keys or values of layer {capture.layer} are infinite or NaN")

    def _block(self, transform: LayerTransform, host: DeviceLayer, number: int, found: Sequence[int]) -> Block:
        """Return what was measured of a block.

        Raises:
            InvalidArgumentError: a row's spread is too large for the codec.
        """
        shape = host.shape
        first = number * shape.size
        length = min(shape.size, shape.tokens - first)
        sinks = min(max(0, shape.sinks - first), length)
        body = host.bodies[number * shape.body_bytes :].numpy()
        at = HEADER.size + self.geometry.fp16_bytes_per_layer(sinks)
        own, count, rows = length - sinks >= shape.own_tokens, length - sinks, transform.rows
        sink_bytes = body[HEADER.size : at]
        if not count:
            return Block(transform, first, sink_bytes, sinks, torch.empty(0, rows), np.empty(0, np.int64), None)
        if own:
            scales = RowScales(found[BLOCK_TOP], body[at : at + rows], body[at + rows : at + 2 * rows].view(np.int8))
            at += 2 * rows
        else:
            scales = calibrated_scales(transform.std, found[BLOCK_TOP] - transform.calibrated.top)
        check_spreads(scales)
        tokens = body[at : at + count].astype(np.int64)
        statistics = BlockStatistics(scales, (tokens >> 4) + LOWEST_GAIN, own)
        classes = (tokens & 15) + LOWEST_CLASS
        return Block(transform, first, sink_bytes, sinks, torch.empty(0, rows), classes, statistics)


def _fixed_bytes(shape: BlockShape, rows: int) -> int:
    """Return the bytes of a layer's segments without records and escapes."""
    total = 0
    for first in range(0, shape.tokens, shape.size):
        length = min(shape.size, shape.tokens - first)
        sinks = min(max(0, shape.sinks - first), length)
        own = 0 < shape.own_tokens <= length - sinks
        scales = 2 * rows if own else 0
        total += SEGMENT_HEADER.size + tier_map_bytes(length) + HEADER.size
        total += 2 * rows * sinks + scales + padded(length - sinks)
    return total


def _starts(blocks: Sequence[Block], steps: LayerSteps) -> torch.Tensor:
    """Return words before each token's record in its block: int32 `[n]`."""
    parts = []
    for block in blocks:
        layout = block.layout(steps)
        parts.append(np.zeros(block.sink_count, np.int32))
        if layout is not None:
            parts.append(layout.starts[:-1].astype(np.int32))
    return torch.from_numpy(np.concatenate(parts))


def _coded(blocks: Sequence[Block], host: DeviceLayer, steps: LayerSteps) -> CodedLayer:
    """Return a layer that came from a GPU, once its headers are written.

    Raises:
        _RoomError: a body takes more than there is room for.
        InvalidArgumentError: a coefficient is too large to be sent as it is.
        InternalError: the GPU laid records out otherwise than the host.
    """
    segments, total_words, total_escapes = [], 0, 0
    for number, (block, found) in enumerate(zip(blocks, host.blocks, strict=True)):
        layout, words, escapes = block.layout(steps), found[BLOCK_WORDS], found[BLOCK_ESCAPES]
        if layout is not None and layout.words != words:
            raise InternalError(
                f"layer {block.transform.layer}: the GPU's records have {words} words, their layout {layout.words}"
            )
        size = block.fixed_bytes + WORD_BYTES * words + ESCAPE_BYTES * escapes
        if size > host.shape.body_bytes:
            raise _RoomError
        body = host.bodies[number * host.shape.body_bytes :][:size]
        body[: HEADER.size] = torch.frombuffer(bytearray(block.header(steps, escapes)), dtype=torch.uint8)
        check_escapes(block.transform.layer, body[size - WORD_BYTES * escapes :].view(torch.float32))
        segments.append(segment_of(block, body, layout))
        total_words += words
        total_escapes += escapes
    return CodedLayer(segments, total_words, total_escapes)
