"""Counts are taken once, and levels are counted by their changes."""

from spectrumkv.vllm_plugin.stats import Tally, added, shown


def test_counts_are_taken_once() -> None:
    tally = Tally.empty()
    tally.add("kv_bytes_coded_total", "FP16", 2)
    tally.add("kv_bytes_coded_total", "FP16", 3)
    assert tally.take() == {"kv_bytes_coded_total": {"FP16": 5}}
    assert tally.take() == {}


def test_levels_add_up_to_what_they_are() -> None:
    tally, total = Tally.empty(), {}
    for level in (10.0, 10.0, 4.0, 0.0):
        tally.set_level("kv_outbox_bytes", level)
        total = added(total, tally.take())
        assert total["kv_outbox_bytes"][""] == level


def test_a_level_that_stays_is_not_counted() -> None:
    tally = Tally.empty()
    tally.set_level("kv_outbox_bytes", 0.0)
    assert tally.take() == {}


def test_log_lines_have_counts_and_no_changes() -> None:
    counts = {"kv_outbox_bytes": {"": -3.0}, "kv_fallbacks_total": {"drops_tokens": 1.0}}
    assert shown(counts) == {"kv_fallbacks_total[drops_tokens]": 1.0}
