"""How many requests may run again."""

import pytest

from spectrumkv.prefill_server.workers import retry_budget
from spectrumkv.prefill_server.workers.retry_budget import RESERVE, SHARE, WINDOW_SECONDS, RetryBudget


def allowed(budget: RetryBudget) -> int:
    count = 0
    while budget.take():
        count += 1
    return count


def test_reruns_are_a_share_of_the_windows_requests_and_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(retry_budget.time, "monotonic", lambda: now)
    budget = RetryBudget()
    assert allowed(budget) == RESERVE
    for _ in range(100):
        budget.count_request()
    assert allowed(budget) == 100 * SHARE
    now += WINDOW_SECONDS / 2
    assert allowed(budget) == 0
    now += WINDOW_SECONDS
    # Requests and reruns are forgotten alike.
    assert allowed(budget) == RESERVE
