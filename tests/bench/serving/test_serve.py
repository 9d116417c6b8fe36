"""The serve bench: loads, their metrics, and both systems on a tiny model."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrumkv.bench.main import build_parser, main
from spectrumkv.bench.serving.aggregated import aggregated_process
from spectrumkv.bench.serving.load import Answer, LoadResult, Served, Workload, offer
from spectrumkv.bench.serving.metrics import Goodput, metrics_row
from spectrumkv.bench.serving.serve import AGGREGATED, Contender, measure
from spectrumkv.common.errors import InvalidArgumentError, ResourceExhaustedError, SpectrumKVError, UnavailableError
from tests.services.reference import generate, reference_model
from tests.tiny_models import VOCABULARY, tiny_model

NO_BOUNDS = Goodput({})


def workload(**changes: Any) -> Workload:
    given = {
        "prompts": 6, "input_tokens": 5, "output_tokens": 4, "rate": None, "max_concurrency": 2, "vocab_size": 100,
        "seed": 0,
    }  # fmt: skip
    return Workload.random(**given | changes)


class CountingSystem:
    """Answers at once, and knows how many requests it had at once."""

    def __init__(self, error: SpectrumKVError | None = None) -> None:
        self.most_at_once = 0
        self.prompts: list[tuple[int, ...]] = []
        self._error = error
        self._running = 0
        self._lock = threading.Lock()

    def complete(self, token_ids: Sequence[int], output_tokens: int) -> Answer:
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            self.prompts.append(tuple(token_ids))
        try:
            if self._error is not None:
                raise self._error
            return Answer(tuple(0.1 * (index + 1) for index in range(output_tokens)), 0.1 * output_tokens, 300, 1000)
        finally:
            with self._lock:
                self._running -= 1


def test_a_workload_is_the_same_for_the_same_seed() -> None:
    assert workload(rate=3.0) == workload(rate=3.0)
    assert workload(seed=1) != workload(seed=2)


def test_a_workload_has_what_was_asked_for() -> None:
    drawn = workload(rate=100.0, max_concurrency=None)
    assert [len(prompt) for prompt in drawn.prompts] == [5] * 6
    assert all(0 <= token < 100 for prompt in drawn.prompts for token in prompt)
    assert list(drawn.arrivals) == sorted(drawn.arrivals)
    assert drawn.arrivals[0] > 0
    assert drawn.max_concurrency == 6
    assert workload().arrivals == (0.0,) * 6


@pytest.mark.parametrize("name", ["prompts", "input_tokens", "output_tokens", "max_concurrency"])
def test_an_empty_workload_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is 0; allowed: 1 or more"):
        workload(**{name: 0})


def test_no_more_requests_at_once_than_allowed() -> None:
    system = CountingSystem()
    result = offer(workload(), system)
    assert system.most_at_once <= 2
    assert sorted(system.prompts) == sorted(workload().prompts)
    assert [one.prompt_tokens for one in result.served] == [5] * 6


def test_requests_come_when_they_should() -> None:
    load = workload(rate=50.0, max_concurrency=6)
    result = offer(load, CountingSystem())
    for one, arrival in zip(result.served, load.arrivals, strict=True):
        assert one.started >= arrival
    assert result.duration >= load.arrivals[-1]


def test_metrics_of_known_requests() -> None:
    served = (
        Served(0.0, 10, Answer((1.0, 1.5, 2.0, 2.5), 2.5, 300, 1000)),
        Served(1.0, 10, Answer((2.0, 3.0, 4.0), 4.0, 100, 1000)),
        Served(2.0, 10, None, ResourceExhaustedError("full", 1.0)),
    )
    row = metrics_row([LoadResult(served, 5.0)], Goodput.parse(["ttft:1500", "tpot:600"]))
    assert (row["completed"], row["failed"], row["duration"]) == (2, 1, 5.0)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (20, 7)
    assert row["request_throughput"] == pytest.approx(0.4)
    assert row["output_throughput"] == pytest.approx(1.4)
    assert row["request_goodput"] == pytest.approx(0.2)
    assert row["mean_ttft_ms"] == row["median_ttft_ms"] == pytest.approx(1500)
    assert row["std_ttft_ms"] == pytest.approx(500)
    assert row["median_itl_ms"] == pytest.approx(500)
    assert row["p99_itl_ms"] == pytest.approx(1000)
    assert row["median_tpot_ms"] == pytest.approx(750)
    assert row["median_handoff_ms"] == pytest.approx(750)
    assert row["median_e2el_ms"] == pytest.approx(3250)
    assert row["kv_sent_bytes"] == 400
    assert row["budget_counted"] == pytest.approx(0.2)
    assert row["first_error"] == "RESOURCE_EXHAUSTED: full"
    # Decoding from 1.0 to 2.5 and from 3.0 to 5.0: five tokens after the first ones.
    assert row["decode_throughput"] == pytest.approx(5 / 3.5)


def test_time_in_which_several_decode_counts_once() -> None:
    overlapping = tuple(Served(0.0, 1, Answer((1.0, 2.0, 3.0), 3.0)) for _ in range(4))
    assert metrics_row([LoadResult(overlapping, 3.0)], NO_BOUNDS)["decode_throughput"] == pytest.approx(4.0)


def test_rounds_are_pooled() -> None:
    one_round = LoadResult((Served(0.0, 3, Answer((1.0, 2.0), 2.0)),), 2.0)
    row = metrics_row([one_round, one_round], NO_BOUNDS)
    assert (row["duration"], row["completed"], row["total_output_tokens"]) == (4.0, 2, 4)
    assert row["request_goodput"] is None
    assert row["budget_counted"] is None


def test_failures_alone_make_a_row_too() -> None:
    result = offer(workload(), CountingSystem(UnavailableError("gone")))
    row = metrics_row([result], NO_BOUNDS)
    assert (row["completed"], row["failed"], row["first_error"]) == (0, 6, "UNAVAILABLE: gone")
    assert row["median_ttft_ms"] is row["p99_handoff_ms"] is row["decode_throughput"] is None


@pytest.mark.parametrize("text", ["ttft", "ttft:", "itl:50", "tpot:fast", "tpot:-1"])
def test_senseless_goodputs_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--goodput"):
        Goodput.parse([text])


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    contenders = [Contender({"system": name}, CountingSystem()) for name in ("spectrumkv", AGGREGATED)]
    rows = measure(workload(prompts=2), contenders, 2, NO_BOUNDS, turns.append)
    assert turns == [
        f"{name}, round {number} of 2"
        for number in (1, 2)
        for name in ("spectrumkv", "spectrumkv", *[AGGREGATED] * 2)
    ]
    assert [row["completed"] for row in rows] == [4, 4]
    assert rows[0]["median_ttft_ms_ratio"] == pytest.approx(1.0)
    assert rows[0]["handoff_itl_ratio"] == pytest.approx(1.0)


def test_without_a_baseline_there_is_no_ratio_to_it() -> None:
    rows = measure(
        workload(), [Contender({"system": "spectrumkv"}, CountingSystem())], 1, NO_BOUNDS, lambda done: None
    )
    assert rows[0]["median_ttft_ms_ratio"] is None


@pytest.mark.parametrize("rate", ["0", "-1", "often"])
def test_senseless_rates_are_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--request-rate", rate])
    assert "allowed: a positive number" in capsys.readouterr().err


def test_the_aggregated_process_is_transformers(capfd: pytest.CaptureFixture[str]) -> None:
    directory = tiny_model("llama")
    reference = reference_model(directory)
    prompts = [torch.arange(7, 27).tolist(), torch.arange(400, 411).tolist()]
    with aggregated_process(str(directory), "cpu", "auto", max_batch=2, max_tokens=64) as system:
        assert system.description["vocab_size"] == VOCABULARY
        alone = system.complete(prompts[0], 6)
        assert alone.token_ids == tuple(generate(reference, prompts[0], 6))
        answer = system.complete(prompts[1], 5)
        assert len(answer.arrivals) == 5
        assert 0 < answer.arrivals[0] < answer.arrivals[-1] <= answer.ended
    with pytest.raises(UnavailableError, match="ended with status"):
        system.complete(prompts[0], 1)


@pytest.mark.slow
def test_an_aggregated_process_that_cannot_serve_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    serving = aggregated_process(str(tiny_model("llama")), "cpu", "auto", max_batch=1, max_tokens=10**6)
    with pytest.raises(UnavailableError, match="status 1"), serving:
        pass
    assert "1000000 tokens" in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_serves_both_systems(tmp_path: Path) -> None:
    result = tmp_path / "serve.json"
    model = str(tiny_model("llama"))
    requests = (
        "--num-prompts",
        "4",
        "--random-input-len",
        "24",
        "--random-output-len",
        "6",
        "--max-concurrency",
        "2",
    )
    kv = ("--policies", "native,default", "--budgets", "0.5", "--int4", "on")
    flags = (*requests, *kv, "--rounds", "1", "--goodput", "ttft:60000", "--json", str(result))
    assert main(["serve", "--model", model, *flags]) == 0
    rows = json.loads(result.read_text())["rows"]
    assert [(row["system"], row["policy"]) for row in rows] == [
        ("spectrumkv", "native"),
        ("spectrumkv", "spectral"),
        ("aggregated", None),
    ]
    for row in rows:
        assert (row["completed"], row["failed"], row["first_error"]) == (4, 0, None)
        assert (row["total_input_tokens"], row["total_output_tokens"]) == (96, 24)
        assert row["request_goodput"] == pytest.approx(row["request_throughput"])
    assert rows[0]["budget_counted"] > 2 > 0.5 >= rows[1]["budget_counted"] > 0.45
    assert rows[2]["kv_sent_bytes"] == 0
    assert rows[0]["median_ttft_ms_ratio"] == pytest.approx(rows[0]["median_ttft_ms"] / rows[2]["median_ttft_ms"])
