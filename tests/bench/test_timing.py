import pytest

from spectrumkv.bench.timing import interleaved_medians
from spectrumkv.common.errors import InvalidArgumentError


def test_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = iter([100.0, 1.0, 3.0, 2.0])

    def operation() -> float:
        calls.append("timed")
        return next(seconds)

    def other() -> float:
        calls.append("other")
        return 0.0

    medians = interleaved_medians({"timed": operation, "other": other}, 3)
    assert medians == {"timed": 2.0, "other": 0.0}
    assert calls == ["timed", "other"] * 4


def test_no_rounds_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="--rounds is 0"):
        interleaved_medians({}, 0)
