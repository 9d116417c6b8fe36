"""How far requests have come, and how many are in the service."""

from prometheus_client import CollectorRegistry

from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.progress import Progress, RequestsInService


def test_times_are_nothing_before_their_tokens() -> None:
    progress = Progress(arrived_at=10.0)
    assert (progress.ttft_seconds, progress.handoff_seconds) == (0.0, 0.0)
    progress.first_token_at = 12.0
    assert (progress.ttft_seconds, progress.handoff_seconds) == (2.0, 0.0)
    progress.second_token_at = 15.0
    assert progress.log_fields() == {"completion_tokens": 0, "ttft_seconds": 2.0, "handoff_seconds": 3.0}


def test_the_first_token_of_each_service_is_timed_once() -> None:
    progress, metrics = Progress(arrived_at=0.0), Metrics(CollectorRegistry())
    for _ in range(2):
        progress.first_token_left(metrics)
    assert (progress.second_token_at, progress.handoff_seconds) == (None, 0.0)
    for _ in range(3):
        progress.token_left(metrics)
    assert progress.completion_tokens == 5
    assert progress.second_token_at is not None
    assert progress.first_token_at is not None
    assert progress.first_token_at <= progress.second_token_at
    sample = metrics.registry.get_sample_value
    assert sample("spectrumkv_time_to_first_token_seconds_sum") == progress.ttft_seconds
    assert sample("spectrumkv_handoff_seconds_sum") == progress.handoff_seconds
    assert sample("spectrumkv_time_to_first_token_seconds_count") == 1
    assert sample("spectrumkv_handoff_seconds_count") == 1


def test_requests_are_counted_while_they_are_in_the_service() -> None:
    requests = RequestsInService()
    with requests.counted():
        with requests.counted():
            assert requests.count == 2
        assert requests.count == 1
    assert requests.count == 0
