"""How streams are packed and where everything that becomes of them starts, against plain numpy."""

import numpy as np
import pytest

from spectrumkv.kernels.spectral.packing import GAPS
from spectrumkv.kernels.spectral.stream_layout import lay_out, make_frames

POISON = np.iinfo(np.int32).min


@pytest.mark.parametrize("seed", range(4))
def test_streams_are_laid_out_one_after_another(seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts, exponent = generator.choice([0, 1, 7, 31, 500], 40), generator.uniform(-9, 40, 40)
    widest, per = np.array([-4.0, -2.0, -1.0, np.inf]), np.array([0, GAPS, 3, 1])
    limits = np.array([0, 1, 2, 127])
    start, raw_start = (np.full(41, POISON, np.int64) for _ in range(2))
    per_byte, limit, raw_bits, packed_bytes = (np.full(40, POISON, np.int64) for _ in range(4))
    lay_out(counts, exponent, widest, per, limits, 4.5, 24, start, per_byte, limit, raw_bits, raw_start, packed_bytes)
    wanted = np.searchsorted(widest, exponent)
    assert (per_byte == per[wanted]).all()
    assert (limit == limits[wanted]).all()
    assert (raw_bits == np.clip(np.ceil(exponent - 4.5), 0, 24)).all()
    assert (start == np.cumsum([0, *counts])).all()
    assert (raw_start == np.cumsum([0, *np.ceil(counts * raw_bits / 32).astype(int)])).all()
    assert (packed_bytes == np.where(per_byte, np.ceil(counts / np.maximum(np.abs(per_byte), 1)), 0)).all()


@pytest.mark.parametrize("seed", range(6))
def test_narrow_streams_have_a_frame_each_and_wide_ones_share_two(seed: int) -> None:
    generator = np.random.default_rng(seed)
    exponent = np.arange(40) / 2 + generator.uniform(-20, 5)
    packed_bytes = generator.choice([0, 0, 1, 7, 500], 40)
    packed_start, frame_start = np.full(40, POISON, np.int64), np.full(41, POISON, np.int64)
    frames = make_frames(exponent, 3.5, packed_bytes, packed_start, frame_start)
    narrow = [[stream] for stream in range(40) if exponent[stream] <= 3.5]
    wide = [[stream for stream in range(phase, 40, 2) if exponent[stream] > 3.5] for phase in range(2)]
    wanted = [streams for streams in [*narrow, *wide] if packed_bytes[streams].sum()]
    assert frames == len(wanted)
    assert (frame_start[: frames + 1] == np.cumsum([0, *(packed_bytes[one].sum() for one in wanted)])).all()
    for frame, streams in enumerate(wanted):
        lengths = packed_bytes[streams]
        assert (packed_start[streams] == frame_start[frame] + np.cumsum([0, *lengths[:-1]])).all()
