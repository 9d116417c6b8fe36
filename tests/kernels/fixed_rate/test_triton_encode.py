"""A layer by kernels in Triton: each step against plain torch or the host's, over memory that held NaN.

Triton runs under its interpreter where there is no GPU; its programs come one after another.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from spectrumkv.common.kv.codecs.calibrated.importance import SENSITIVITY_POWER
from spectrumkv.common.kv.codecs.fixed_rate.gpu.basis import DeviceBasis
from spectrumkv.common.kv.codecs.fixed_rate.rate import AIM, LayerDemand, RateControl
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import HEADER
from spectrumkv.common.kv.codecs.fixed_rate.statistics import measure
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.kernels.fixed_rate import reference
from spectrumkv.kernels.fixed_rate.layout import LOWEST_GAIN, PROFILE_OF_BYTE, PROFILES, RecordLayout
from spectrumkv.kernels.fixed_rate.operands import Records
from spectrumkv.kernels.fixed_rate.quantizer import escape_limits
from spectrumkv.kernels.fixed_rate.triton.encoding.encode import encode, pack_again
from spectrumkv.kernels.fixed_rate.triton.encoding.memory import LayerRate
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import (
    SEGMENT_BROKEN,
    SEGMENT_ESCAPES,
    SEGMENT_WORDS,
    SegmentShape,
)
from spectrumkv.kernels.step_classes import COARSEST_CLASS, LOWEST_CLASS
from tests.common.kv.codecs.spectral_prompts import basis_of, capture, geometry, plain_coefficients
from tests.kernels.absmax.states import DEVICE
from tests.kernels.fixed_rate.triton_layers import LAYERS, Case, Coded, SegmentOfLayer, coded, on_host, segments

ROOM = 1 << 14
CASES = {
    "one token": Case(1, 6, SegmentShape(1, 8, 0, 1, ROOM), 9.0),
    "sinks in three segments": Case(1, 6, SegmentShape(9, 2, 5, 1, ROOM), 9.0, layer=1),
    "only sinks": Case(1, 6, SegmentShape(3, 4, 4, 1, ROOM), 9.0),
    "own and calibrated scales": Case(2, 16, SegmentShape(14, 9, 2, 7, ROOM), 12.0, torch.float16),
    "last layer": Case(2, 20, SegmentShape(7, 7, 1, 5, ROOM), 4.0, torch.bfloat16, layer=2),
    "wide heads": Case(1, 80, SegmentShape(6, 6, 2, 2, ROOM), 12.0),
}
SLOW_CASES = {
    "many rows": Case(8, 128, SegmentShape(40, 40, 4, 20, 1 << 17), 12.0, torch.bfloat16),
    "several segments": Case(3, 64, SegmentShape(150, 64, 4, 40, 1 << 16), 10.0),
    "coarse": Case(3, 64, SegmentShape(70, 70, 4, 40, 1 << 16), 1.0),
    "fine": Case(2, 16, SegmentShape(70, 40, 0, 20, 1 << 16), 60.0),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nothing was written to is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def assert_coefficients(made: Coded) -> None:
    keys, values = made.states
    plain = plain_coefficients(made.basis, made.case.layer, keys, values, 0)
    wanted = plain.permute(2, 0, 1, 3).reshape(made.case.shape.tokens, -1).float()
    torch.testing.assert_close(made.work.coefficients, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def assert_statistics(made: Coded, segment: SegmentOfLayer) -> None:
    transform = LayerTransform.of_layers(made.basis)[made.case.layer]
    coefficients = made.work.coefficients[segment.tokens]
    energy = (coefficients * made.gain_scale).square().sum(dim=1)
    wanted = measure(coefficients, energy, transform.std, segment.own)
    # Logarithms differ in their last bits, and so may what is rounded.
    for mine, theirs in (
        ((segment.of_tokens.numpy() >> 4).astype(np.int64) + LOWEST_GAIN, wanted.gains),
        (
            segment.scales.top - segment.scales.drops.astype(np.int64),
            wanted.scales.top - wanted.scales.drops.astype(int),
        ),
        (segment.scales.means.astype(np.int64), wanted.scales.means),
    ):
        assert np.abs(mine - theirs).max() <= 1
        assert (mine != theirs).mean() <= 0.1
    assert made.layer.segments[segment.number][SEGMENT_BROKEN] == 0


def assert_classes(made: Coded, of_segments: list[SegmentOfLayer]) -> None:
    shares = made.scores.double().clamp_min(1e-7).log2()
    octaves = -SENSITIVITY_POWER * (shares - shares[made.case.shape.sinks :].mean())
    wanted = (2 * octaves).round().clamp(LOWEST_CLASS, COARSEST_CLASS)
    for segment in of_segments:
        mine = (segment.of_tokens.long() & 15) + LOWEST_CLASS
        assert int((mine - wanted[segment.tokens]).abs().max()) <= 1
        assert float((mine != wanted[segment.tokens]).double().mean()) <= 0.1


def assert_steps(made: Coded, of_segments: list[SegmentOfLayer]) -> None:
    """The base that the host finds for these scales and tokens, to the last digit."""
    demand = LayerDemand(
        [one.scales.group_exponents for one in of_segments],
        [np.bincount(PROFILE_OF_BYTE[one.of_tokens.numpy()], minlength=PROFILES) for one in of_segments],
        0,
    )
    transforms, given = LayerTransform.of_layers(made.basis), made.rate
    rate = RateControl(0, transforms, given.drift, 0.0, given.smooth_base, 0, made.case.layer)
    rate.segment_bytes = math.ceil(4 * given.words / (1.0 if rate.is_last else AIM))
    assert rate.expected_words(0) == given.words
    assert (rate.drift_weight, rate.base_weight) == (given.drift_weight, given.base_weight)
    rate.observe(demand)
    assert made.layer.drift == pytest.approx(rate.drift, abs=1e-9)
    wanted = demand.finest_base(given.words) if rate.is_last else rate.base(demand)
    assert made.layer.base == wanted
    assert rate.is_last or made.layer.smooth_base == pytest.approx(rate.smooth_base, abs=1e-4)


def assert_records(made: Coded, segment: SegmentOfLayer, base: int, turn: int) -> None:
    """The bytes that plain torch makes of the same coefficients."""
    layout = RecordLayout.of(segment.scales, segment.of_tokens.numpy(), base, turn)
    assert torch.equal(made.work.order[segment.number].long(), torch.from_numpy(segment.scales.order))
    limits = torch.from_numpy(escape_limits(layout))
    wanted = reference.pack(made.work.coefficients[segment.tokens], segment.scales, segment.of_tokens, layout, limits)
    found = made.layer.segments[segment.number]
    assert found[SEGMENT_WORDS] == layout.words
    assert found[SEGMENT_ESCAPES] == wanted.escape_value.numel()
    assert_sections(segment.body[segment.words_at :], wanted)


def assert_sections(body: torch.Tensor, wanted: Records) -> None:
    for section in (wanted.words, wanted.escape_index, wanted.escape_value.view(torch.uint8)):
        assert torch.equal(body[: section.numel()], section)
        body = body[section.numel() :]
    # Nothing is written behind what a body has.
    assert bool((body == 255).all())


def assert_coded(case: Case) -> Coded:
    made = coded(case)
    assert made.layer.broken_scores == 0
    assert_coefficients(made)
    of_segments = list(segments(made))
    for segment in of_segments:
        assert_statistics(made, segment)
    if of_segments:
        assert_classes(made, of_segments)
        assert_steps(made, of_segments)
    for segment in of_segments:
        first = len(segment.of_tokens)
        assert torch.equal(made.work.starts[segment.tokens][:1], torch.zeros(1, dtype=torch.int32))
        assert_records(made, segment, made.layer.base, first)
    return made


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_host(name: str) -> None:
    assert_coded(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_every_step_is_that_of_the_host_at_larger_shapes(name: str) -> None:
    made = assert_coded(SLOW_CASES[name])
    if name == "several segments":
        assert sum(found[SEGMENT_ESCAPES] for found in made.layer.segments) > 0


def test_a_layer_is_packed_again_at_other_steps() -> None:
    case = Case(1, 6, SegmentShape(9, 5, 1, 5, ROOM), 9.0)
    made = coded(case)
    of_segments = list(segments(made))
    base, turn = made.layer.base - 40, 7
    starts = torch.zeros(case.shape.tokens, dtype=torch.int32)
    for segment in of_segments:
        own_turn = min(max(0, turn - segment.tokens.start), len(segment.of_tokens))
        layout = RecordLayout.of(segment.scales, segment.of_tokens.numpy(), base, own_turn)
        starts[segment.tokens] = torch.from_numpy(layout.starts[:-1]).int()
        on_device = made.on_device[0].bodies[segment.number * case.shape.body_bytes :]
        on_device[segment.words_at : case.shape.body_bytes] = 255
    for _ in range(2):
        pack_again(*made.on_device, base, turn, starts)
        layer, work = on_host(*made.on_device)
        again = made._replace(layer=layer, work=work)
        for segment in segments(again):
            assert_records(again, segment, base, min(max(0, turn - segment.tokens.start), len(segment.of_tokens)))


def test_a_body_without_room_is_counted_and_nothing_is_written_behind_it() -> None:
    shape = SegmentShape(12, 6, 0, 1, 96)
    tight, roomy = coded(Case(1, 6, shape, 30.0)), coded(Case(1, 6, replace(shape, body_bytes=ROOM), 30.0))
    assert tight.layer.segments == roomy.layer.segments
    assert all(found[SEGMENT_WORDS] > 12 for found in tight.layer.segments)
    for number in range(shape.segments):
        mine = tight.layer.bodies[96 * number :][HEADER.size : 96]
        theirs = roomy.layer.bodies[ROOM * number :][HEADER.size : 96]
        # Records that fit are the same; escapes are written all or not at all.
        written = mine != 255
        assert torch.equal(mine[written], theirs[written])


def test_a_body_without_room_for_its_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for 73 bytes before the records"):
        coded(Case(1, 6, SegmentShape(12, 6, 1, 5, 48), 9.0))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_counted_in_its_block(side: int, value: float) -> None:
    case = Case(1, 6, SegmentShape(8, 4, 1, 1, ROOM), 9.0)
    shape = geometry(1, 6, LAYERS)
    seen = capture(basis_of(shape), 0, 8)
    states = (seen.keys.clone(), seen.values.clone())
    there = DeviceBasis(basis_of(shape), DEVICE)
    scores = torch.full((8,), 0.1)
    scores[3] = value
    for token in (0, 6):
        states[side][0, token, 2] = value
    angles, rate = there.angles(8), LayerRate(100, 0.0, 1.0, 0.0, 1.0)
    inputs = [one.to(DEVICE) for one in (*states, scores)]
    of_layer = (angles[0][0], angles[1][0])
    layer, _ = on_host(*encode(*inputs, of_layer, there.analysis(0), there.gain_scales(0)[0], case.shape, rate))
    assert [found[SEGMENT_BROKEN] for found in layer.segments] == [1, 1]
    assert layer.broken_scores == 1
