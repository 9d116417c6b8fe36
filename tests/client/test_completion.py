import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.client.timings import Timings


def test_definitions_on_a_worked_example():
    timings = Timings.from_arrivals([0.5, 0.8, 0.9], 1.0)
    assert timings.ttft_ms == pytest.approx(500)
    assert timings.handoff_ms == pytest.approx(300)
    assert timings.itl_ms == pytest.approx((300, 100))
    assert timings.e2el_ms == pytest.approx(1000)
    assert timings.tpot_ms == pytest.approx((1000 - 500) / 2)
    assert timings.tokens_per_second == pytest.approx(4)


def test_one_token_has_neither_handoff_nor_tpot():
    timings = Timings.from_arrivals([0.5], 0.6)
    assert (timings.tpot_ms, timings.handoff_ms, timings.itl_ms) == (None, None, ())
    assert timings.tokens_per_second is None


def test_no_token_has_no_ttft():
    assert Timings.from_arrivals([], 0.25) == Timings(None, None, (), 250.0, None)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=50).map(sorted), st.floats(0, 10))
def test_gaps_and_tail_add_up_to_the_whole(arrivals, tail):
    timings = Timings.from_arrivals(arrivals, arrivals[-1] + tail)
    assert timings.ttft_ms + sum(timings.itl_ms) + tail * 1000 == pytest.approx(timings.e2el_ms, abs=1e-6)
    assert timings.tpot_ms * (len(arrivals) - 1) == pytest.approx(timings.e2el_ms - timings.ttft_ms, abs=1e-6)


@pytest.mark.parametrize(("arrivals", "ended"), [([0.2, 0.1], 0.3), ([0.2], 0.1), ([-0.1], 0.1)])
def test_times_that_run_backwards_are_refused(arrivals, ended):
    with pytest.raises(ValueError, match="ascend"):
        Timings.from_arrivals(arrivals, ended)
