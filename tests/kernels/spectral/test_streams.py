"""Coefficients to streams and back, against plain numpy and torch."""

import numpy as np
import pytest
import torch

from spectrumkv.kernels.spectral import reference, streams

POISON = np.iinfo(np.int32).min
Coded = tuple[np.ndarray, np.ndarray]


def layout(rows: int, tokens: int, runs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows in a random order, cut into runs; tokens of five classes, one of them empty; streams by class and run."""
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, rows), runs - 1, replace=False))
    run_start = np.concatenate(([0], cuts, [rows])).astype(np.int64)
    of_each = np.bincount(generator.choice([0, 1, 3, 4], tokens), minlength=5)
    stream_of = np.arange(5)[::-1, None] + np.arange(runs)[None, :]
    counts = np.bincount(stream_of.ravel(), (of_each[:, None] * np.diff(run_start)[None, :]).ravel())
    return {
        "row_order": generator.permutation(rows),
        "run_start": run_start,
        "class_start": np.concatenate(([0], np.cumsum(of_each))),
        "stream_of": stream_of,
        "start": np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        "step": np.exp2(np.arange(5) / 2 - 3).astype(np.float32),
    }


def naive_streams(coefficients: np.ndarray, plan: dict[str, np.ndarray]) -> np.ndarray:
    """Class by class, run by run, row by row, appended to lists."""
    lists: list[list[int]] = [[] for _ in range(len(plan["start"]) - 1)]
    for number, step in enumerate(plan["step"]):
        tokens = slice(plan["class_start"][number], plan["class_start"][number + 1])
        for run in range(len(plan["run_start"]) - 1):
            for row in plan["row_order"][plan["run_start"][run] : plan["run_start"][run + 1]]:
                scaled = np.rint(coefficients[row, tokens] * (1 / step)).astype(np.int32)
                lists[plan["stream_of"][number, run]] += scaled.tolist()
    return np.array([symbol for one in lists for symbol in one], np.int32)


def offsets_of(plan: dict[str, np.ndarray], rows: int) -> np.ndarray:
    offset = np.full((len(plan["step"]), rows), -1)
    order = plan["row_order"], plan["run_start"], plan["class_start"], plan["stream_of"]
    streams.offsets(*order, plan["start"], offset)
    return offset


def unsorted(symbols: np.ndarray, plan: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """The integers of streams, row by row."""
    offset, classes = offsets_of(plan, rows), np.diff(plan["class_start"])
    return np.array(
        [
            np.concatenate([symbols[start : start + count] for start, count in zip(of_row, classes, strict=True)])
            for of_row in offset.T
        ]
    )


def in_blocks(coefficients: np.ndarray, plan: dict[str, np.ndarray], in_trellis: np.ndarray, together: int) -> Coded:
    """Quantize some tokens at a time, and dequantize what came out."""
    rows, tokens = coefficients.shape
    symbols, back = np.full(coefficients.size, POISON, np.int32), np.full_like(coefficients, np.nan)
    offset, largest = offsets_of(plan, rows), []
    for first in range(0, tokens, together):
        count = min(together, tokens - first)
        # As in a buffer: there is more of everything, and what it is does not matter.
        some = np.full((rows + 3, count + 5), np.nan, np.float32)
        some[:rows, :count] = coefficients[:, first : first + count]
        order = first, count, plan["class_start"]
        largest.append(streams.quantize(some, *order, 1 / plan["step"], offset, in_trellis, symbols))
    for first in range(0, tokens, together):
        count = min(together, tokens - first)
        some = np.full((rows + 3, count + 5), np.nan, np.float32)
        streams.dequantize(symbols, first, count, plan["class_start"], plan["step"], offset, in_trellis, some)
        assert np.isnan(some[rows:]).all()
        assert np.isnan(some[:, count:]).all()
        back[:, first : first + count] = some[:rows, :count]
    assert np.array(max(largest), np.int32).view(np.float32) == np.abs(coefficients).max()
    return symbols, back


SHAPES = pytest.mark.parametrize(("rows", "tokens", "runs"), [(32, 1, 2), (192, 17, 5), (400, 333, 11)])


@SHAPES
@pytest.mark.parametrize("largest", [4.0, 2.0**26])
@pytest.mark.parametrize("together", [7, 48, 1000])
def test_coefficients_are_sorted_into_streams_and_back(
    rows: int, tokens: int, runs: int, largest: float, together: int
) -> None:
    plan = layout(rows, tokens, runs)
    coefficients = np.random.default_rng(1).normal(0, largest, (rows, tokens)).clip(-largest, largest)
    coefficients = coefficients.astype(np.float32)
    symbols, back = in_blocks(coefficients, plan, np.zeros(rows, np.int64), together)
    assert (symbols == naive_streams(coefficients, plan)).all()
    half_step = np.repeat(plan["step"], np.diff(plan["class_start"]))[None, :] / 2
    assert (np.abs(back - coefficients) <= half_step * 1.0001 + np.abs(coefficients) * 2.0**-22).all()


@SHAPES
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("together", [7, 1000])
def test_paths_through_the_trellis_are_the_best_and_are_found_again(
    rows: int, tokens: int, runs: int, share: float, together: int
) -> None:
    plan, generator = layout(rows, tokens, runs), np.random.default_rng(2)
    coefficients = generator.normal(0, 4, (rows, tokens)).astype(np.float32)
    in_trellis = np.where(generator.random(rows) < share, tokens, generator.integers(0, tokens + 1, rows))
    symbols, back = in_blocks(coefficients, plan, in_trellis, together)
    coded = torch.from_numpy(np.arange(tokens) < in_trellis[:, None])
    step = np.repeat(plan["step"], np.diff(plan["class_start"]))
    scaled = torch.from_numpy(coefficients / step).double()
    integers = torch.from_numpy(unsorted(symbols, plan, rows)).long()
    assert (integers[~coded] == scaled[~coded].round()).all()
    values = reference.trellis_values(integers, coded)
    assert back == pytest.approx((values * torch.from_numpy(step)).numpy(), rel=1e-6)
    errors = torch.where(coded, values - scaled, 0).square().sum(dim=0)
    assert errors == pytest.approx(reference.least_trellis_error(scaled, coded), rel=1e-4, abs=1e-4)


def test_the_trellis_leaves_four_fifths_of_the_squared_error_of_rounding() -> None:
    plan = layout(64, 4000, 2)
    coefficients = np.random.default_rng(3).normal(0, 4, (64, 4000)).astype(np.float32)
    step = np.repeat(plan["step"], np.diff(plan["class_start"]))
    errors = []
    for in_trellis in (0, 4000):
        _, back = in_blocks(coefficients, plan, np.full(64, in_trellis), 240)
        errors.append(float(np.square((back - coefficients) / step).mean()))
    assert errors[0] == pytest.approx(1 / 12, rel=0.01)
    assert errors[1] == pytest.approx(0.81 / 12, rel=0.01)


@pytest.mark.parametrize("in_trellis", [0, 100, 333])
@pytest.mark.parametrize(("odd", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf"), (-7.5, "7.5")])
def test_the_largest_magnitude_is_found_wherever_it_is(odd: float, shown: str, in_trellis: int) -> None:
    plan = layout(192, 333, 5)
    coefficients = np.random.default_rng(2).uniform(-1, 1, (192, 333)).astype(np.float32)
    coefficients[101, 77] = odd
    symbols = np.empty(coefficients.size, np.int32)
    order = 0, 333, plan["class_start"]
    counts = np.full(192, in_trellis)
    largest = streams.quantize(coefficients, *order, 1 / plan["step"], offsets_of(plan, 192), counts, symbols)
    assert str(np.array(largest, np.int32).view(np.float32)) == shown
