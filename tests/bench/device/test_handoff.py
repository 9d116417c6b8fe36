"""Both sides' moments make the time line of a hand-off, and hand-offs make a row."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrumkv.bench.device.scale import CONTENDERS, kv_choice
from spectrumkv.bench.device.timeline.clock import DeviceClock
from spectrumkv.bench.device.timeline.decode_side import LayerArrival
from spectrumkv.bench.device.timeline.handoff import MOMENTS, Handoff, LayerTimes, handoff_row, layer_times
from spectrumkv.bench.device.timeline.plots import STEPS, draw_timelines
from spectrumkv.bench.device.timeline.prefill_side import PrefillMarks
from spectrumkv.bench.models.synthetic_prompt import synthetic_basis
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict


def handoff(seconds: float, prefill: float = 2.0) -> Handoff:
    """Return a hand-off of two layers whose last is computed after a second."""
    layers = (
        LayerTimes(0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
        LayerTimes(1, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.0 + seconds),
    )
    return Handoff(layers, prefill, message_bytes=300)


def test_moments_of_a_layer_are_those_of_its_last_chunk() -> None:
    marks = PrefillMarks(
        computed={0: 101.0, 1: 102.0},
        coding={0: 101.5, 1: 102.5},
        coded={0: 102.0, 1: 103.0},
        # Layer 0 ended in chunk 1, in which layer 1 began.
        handed_over={0: 102.1, 1: 103.1, 2: 103.2},
    )
    arrivals = [LayerArrival(0, 1, 103.5, 104.0, 104.5), LayerArrival(1, 2, 103.6, 104.6, 105.0)]
    clock = DeviceClock(torch.device("cpu"))
    assert layer_times(marks, clock, arrivals, started=100.0) == (
        LayerTimes(0, 1.0, 1.5, 2.0, pytest.approx(3.1), 3.5, 4.0, 4.5),
        LayerTimes(1, 2.0, 2.5, 3.0, pytest.approx(3.2), pytest.approx(3.6), pytest.approx(4.6), 5.0),
    )


def test_a_hand_off_lasts_from_the_last_layer_computed_to_the_last_one_joined() -> None:
    assert handoff(0.6).seconds == pytest.approx(0.6)
    assert handoff(0.6).ratio == pytest.approx(0.3)
    # The first layer may be the last one to join.
    late = LayerTimes(0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 9.0)
    assert Handoff((late, handoff(0.6).layers[1]), 2.0, 300).seconds == pytest.approx(8.0)


def test_a_row_has_medians_and_the_layers_of_the_median_hand_off() -> None:
    row = handoff_row([handoff(0.9), handoff(0.6, prefill=3.0), handoff(0.5)], fp16_bytes=1000)
    assert row["handoff_ms"] == pytest.approx(600)
    assert row["prefill_ms"] == pytest.approx(2000)
    assert row["handoff_ratio"] == pytest.approx(0.25)
    assert row["budget_counted"] == pytest.approx(0.3)
    assert [layer["joined"] for layer in row["layers"]] == pytest.approx([1.1, 1.6])
    assert [one["handoff_ms"] for one in row["rounds"]] == pytest.approx([900, 600, 500])
    assert row["coding_to_coded_ms"] == pytest.approx(100)
    assert [key for key in row if "_to_" in key] == [f"{a}_to_{b}_ms" for a, b in pairwise(MOMENTS)]


def test_every_step_has_a_colour_and_the_picture_is_written(tmp_path: Path) -> None:
    assert list(STEPS) == list(MOMENTS[1:])
    rows: list[dict[str, Any]] = [
        {"contender": name, "mps": mps} | handoff_row([handoff(0.6)], 1000)
        for mps in (False, True)
        for name in ("native", "adaptive")
    ]
    path = tmp_path / "timeline.png"
    draw_timelines(rows, str(path), "a model")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_cpu_clock_is_the_machines() -> None:
    clock = DeviceClock(torch.device("cpu"))
    clock.anchor()
    before = time.monotonic()
    assert before <= clock.seconds(clock.mark()) <= time.monotonic()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_clock_tells_when_work_is_done() -> None:
    clock = DeviceClock(torch.device("cuda"))
    states = torch.randn(4096, 4096, device="cuda")
    clock.anchor()
    before = time.monotonic()
    first = clock.mark()
    for _ in range(50):
        states = states @ states
    launched, second = time.monotonic(), clock.mark()
    done = clock.seconds(second)
    assert before - 1e-3 <= clock.seconds(first) <= launched + 1e-3
    assert clock.seconds(first) < done <= time.monotonic() + 1e-3


def test_contenders_are_policies_with_or_without_a_codec() -> None:
    choices = {name: kv_choice(name) for name in CONTENDERS}
    assert choices["native"].to_proto().WhichOneof("_budget") is None
    assert (choices["adaptive"].policy, choices["adaptive"].budget, choices["adaptive"].codec) == (
        "adaptive",
        0.3,
        None,
    )
    assert (choices["spectral:absmax"].policy, choices["spectral:absmax"].codec) == ("spectral", "absmax")
    # A codec that is renamed or gone shows here, and not on a GPU.
    geometry = KvGeometry(2, 2, 64, torch.bfloat16)
    verdict = ProbeVerdict.from_flag("on", geometry.layers)
    for choice in choices.values():
        options, basis = choice.to_proto(), synthetic_basis(geometry)
        plan = KvPlan.resolve(options, build(PrefillConfig, {}), verdict, seed=0, basis=basis)
        plan.encoder(geometry, 4096, framing_bytes=1000)
    with pytest.raises(InvalidArgumentError, match="spectrral"):
        kv_choice("spectrral:absmax")
