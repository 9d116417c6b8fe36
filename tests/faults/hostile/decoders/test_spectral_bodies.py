"""Harmed spectral bodies: the decoder returns or raises DataLossError, within its arrays and within bounded memory.

Compiled loops do not check bounds; where one left its array, memory would be harmed in silence. So such bodies are
also decoded by a process in which numba does check.
"""

import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder
from spectrumkv.common.kv.codecs.spectral.transform import LayerTransform
from tests.faults.hostile.bodies import BODY_HARMS, BOMB_BYTES, bombs, lying_frames
from tests.faults.hostile.decoders.attack_spectral import GEOMETRY, attack, basis
from tests.faults.hostile.dialogue import spectral_segments
from tests.faults.hostile.spectral_body import taken_apart, with_body
from tests.faults.report import tell

SHORT_RUN, LONG_RUN = 1500, 20_000
BOUNDS_CHECKED_RUN = 10_000
MOST_MEMORY = 4 << 20
TOKENS = 40


def assert_tried_enough(tried: "dict[str, int]", attempts: int) -> None:
    assert min(tried[kind] for kind in BODY_HARMS) > attempts // 40
    # Some harm is none that anybody could find: other steps, other raw bits. Most is found.
    assert attempts // 20 < tried["decoded"] < attempts // 2


def test_harmed_bodies_are_decoded_or_refused() -> None:
    assert_tried_enough(attack(SHORT_RUN, seed=1), SHORT_RUN)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_many_harmed_bodies(capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    tried = attack(LONG_RUN, seed)
    tell(capsys, f"{LONG_RUN} spectral bodies, seed {seed}: {dict(tried)}")
    assert_tried_enough(tried, LONG_RUN)


def test_compiled_loops_stay_within_their_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    command = [
        sys.executable,
        "-m",
        "tests.faults.hostile.decoders.attack_spectral",
        str(BOUNDS_CHECKED_RUN),
        str(seed),
    ]
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    tell(capsys, done.stdout.strip())


@pytest.mark.parametrize("field", ["classes", "symbols"])
@pytest.mark.parametrize("code", [*bombs(), *lying_frames()])
def test_a_bomb_is_refused_before_it_takes_memory(field: str, code: bytes) -> None:
    *_, segment = spectral_segments(random.Random(3), GEOMETRY, basis(), TOKENS)
    transform = LayerTransform.of_layers(basis())[segment.layer]
    body = taken_apart(segment.body.numpy().tobytes(), segment.tiers.numel(), transform, GEOMETRY)
    if field == "classes":
        body.classes = code
    else:
        body.frames = [code] * len(body.frames)
    body.make_lengths_agree()
    harmed = with_body(segment, body.assembled())
    states = torch.empty(2, GEOMETRY.kv_heads, segment.tiers.numel(), GEOMETRY.head_dim)
    tracemalloc.start()
    try:
        with pytest.raises(DataLossError):
            SpectralDecoder(basis(), GEOMETRY).decode(harmed, states[0], states[1])
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY < BOMB_BYTES
    finally:
        tracemalloc.stop()
