"""Layers that kernels in Triton coded, and their segments as the bodies say."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import torch

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.fixed_rate.gains import gain_level
from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER, padded
from spectrumkv.common.kv.codecs.fixed_rate.statistics import calibrated_scales
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate.layout import (
    RowScales,
)
from spectrumkv.kernels.fixed_rate.triton.encoding.encode import encode
from spectrumkv.kernels.fixed_rate.triton.encoding.memory import CodedLayer, LayerRate, Workspace
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import (
    SEGMENT_TOP,
    SegmentShape,
)
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry
from tests.kernels.absmax.states import DEVICE

LAYERS = 3


class Case(NamedTuple):
    kv_heads: int
    head_dim: int
    # Tokens, of a segment, sinks, from how many coded tokens on scales are a segment's own, room for a body.
    shape: SegmentShape
    # Of all layers' records, for each coefficient of this layer.
    bits: float
    dtype: torch.dtype = torch.float32
    layer: int = 0


class Coded(NamedTuple):
    """A layer that was coded, and what it was made of."""

    case: Case
    basis: CalibratedBasis
    states: tuple[torch.Tensor, torch.Tensor]
    scores: torch.Tensor
    layer: CodedLayer
    work: Workspace
    rate: LayerRate
    on_device: tuple[CodedLayer, Workspace]
    gain_scale: torch.Tensor

    @property
    def rows(self) -> int:
        return 2 * self.case.kv_heads * self.case.head_dim


def coded(case: Case) -> Coded:
    shape = replace(geometry(case.kv_heads, case.head_dim, LAYERS), native_dtype=case.dtype)
    basis = basis_of(shape)
    seen = capture(basis, case.layer, case.shape.tokens)
    # A few coefficients escape.
    noise = torch.randn(seen.keys.shape, generator=torch.Generator().manual_seed(4)).exp()
    keys, values = (seen.keys * noise).to(case.dtype), seen.values.to(case.dtype)
    scores = torch.rand(case.shape.tokens, generator=torch.Generator().manual_seed(1)).pow(4) / case.shape.tokens
    there = DeviceBasis(basis, DEVICE)
    angles = there.angles(case.shape.tokens)
    kind = there.kinds[case.layer]
    words = int(case.bits * case.shape.tokens * 2 * case.kv_heads * case.head_dim / 32)
    rate = LayerRate(
        words, -3.25, 1.0 if case.layer == 0 else 0.5, -300.5, 1.0 if case.layer == LAYERS - 1 else 1 / 3
    )
    states = (keys.to(DEVICE), values.to(DEVICE), scores.to(DEVICE))
    of_layer = (angles[0][kind], angles[1][kind])
    token_bytes = case.bits * 2 * case.kv_heads * case.head_dim / 8
    gain_scale = there.gain_scales(gain_level(LayerTransform.of_layers(basis), token_bytes))[case.layer]
    on_device = encode(*states, of_layer, there.analysis(case.layer), gain_scale, case.shape, rate)
    layer, work = on_host(*on_device)
    return Coded(case, basis, (keys, values), scores, layer, work, rate, on_device, gain_scale.cpu())


def on_host(layer: CodedLayer, work: Workspace) -> tuple[CodedLayer, Workspace]:
    copies = {one.name: getattr(work, one.name).cpu() for one in fields(work)}
    return layer.copied(layer.memory.cpu()), replace(work, **copies)


class SegmentOfLayer(NamedTuple):
    """A segment, as its body says."""

    number: int
    tokens: slice
    scales: RowScales
    own: bool
    of_tokens: torch.Tensor
    body: torch.Tensor
    words_at: int


def segments(made: Coded) -> Iterator[SegmentOfLayer]:
    """Segments that have coded tokens; what comes before those is checked here."""
    shape, rows = made.case.shape, made.rows
    half_dtype = torch.float16 if made.case.dtype == torch.float32 else made.case.dtype
    for number in range(shape.segments):
        first = number * shape.size
        length = min(shape.size, shape.tokens - first)
        sinks = min(max(0, shape.sinks - first), length)
        body = made.layer.bodies[number * shape.body_bytes :][: shape.body_bytes]
        at = HEADER.size + 2 * rows * sinks
        exact = torch.stack([one[:, first : first + sinks] for one in made.states]).to(half_dtype)
        assert torch.equal(body[HEADER.size : at], exact.flatten().view(torch.uint8))
        count = length - sinks
        if not count:
            assert made.layer.segments[number] == [0, 0, 0, 0]
            continue
        transform = LayerTransform.of_layers(made.basis)[made.case.layer]
        top, own = made.layer.segments[number][SEGMENT_TOP], count >= shape.own_tokens
        if own:
            drops, means = body[at : at + rows].numpy(), body[at + rows : at + 2 * rows].numpy().view(np.int8)
            scales = RowScales(top, drops, means)
            at += 2 * rows
        else:
            scales = calibrated_scales(transform.std, top - transform.calibrated.top)
        of_tokens, end = body[at : at + count], at + padded(count)
        assert not body[at + count : end].any()
        yield SegmentOfLayer(number, slice(first + sinks, first + length), scales, own, of_tokens, body, end)
