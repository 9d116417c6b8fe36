"""A decode worker that admits requests and fails them: they go on elsewhere, and soon none goes there."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import (
    DataLossError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.service import DecodeService
from spectrumkv.prefill_server.workers import circuit_breaker, lease, retry_budget
from spectrumkv.prefill_server.workers.circuit_breaker import FAILURES_TO_EJECT
from spectrumkv.v1 import generation_pb2
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import decode_server, failing_requests, prefill_server, sample, total
from tests.waiting import until

# Of the tiny llama.
SLOT_BYTES = 3072
PROMPT = TokenIds(tuple(random_prompt(100)))
SAMPLED = Sampling(max_tokens=6, ignore_eos=True, temperature=1.0, seed=5)


@dataclass
class Fleet:
    """Prefill in front of a sound worker and of a larger one that fails every step from when it is broken."""

    client: SpectrumClient
    metrics: Metrics
    broken: DecodeService
    broken_metrics: Metrics
    broken_name: str
    sound: DecodeService

    def ask(self, sampling: Sampling = SAMPLED) -> Completion:
        return self.client.generate(PROMPT, sampling=sampling, kv=KvChoice(policy="fp16"), timeout=60).result()

    def passed_over(self) -> float:
        return total(self.metrics, "decode_workers_passed_over_total")

    @property
    def ejected(self) -> bool:
        return sample(self.metrics, "decode_worker_ejected", worker=self.broken_name) == 1


@pytest.fixture
def fleet(tiny_directories: dict[str, Path]) -> Iterator[Fleet]:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory=str(1024 * SLOT_BYTES)) as (broken, broken_metrics, broken_port),
        decode_server(model, kv_memory=str(200 * SLOT_BYTES)) as (sound, _, sound_port),
        prefill_server(model, [broken_port, sound_port]) as (_, metrics, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        name = f"127.0.0.1:{broken_port}"
        until(lambda: sample(metrics, "decode_worker_slots_free", worker=name) > 0)
        until(lambda: total(metrics, "decode_worker_accepting") == 2)
        yield Fleet(client, metrics, broken, broken_metrics, name, sound)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), UnavailableError("device lost")])
def test_clients_see_nothing_of_a_worker_that_fails_what_it_admits(fleet: Fleet, error: Any) -> None:
    expected = fleet.ask()
    assert expected.usage.decode_worker == fleet.broken_name
    assert fleet.client.server_info().decode_workers_ejected == []
    with failing_requests(fleet.broken, error):
        for _ in range(20):
            answer = fleet.ask()
            assert answer.token_ids == expected.token_ids
            assert answer.usage.decode_worker != fleet.broken_name
        assert fleet.ejected
        assert fleet.client.server_info().decode_workers_ejected == [fleet.broken_name]
    # Not each request tried it first.
    assert fleet.passed_over() == FAILURES_TO_EJECT


def test_one_that_fails_only_long_prompts_is_left_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones succeed between its failures, so that three in a row never come."""
    monkeypatch.setattr(retry_budget, "RESERVE", 8)
    monkeypatch.setattr(retry_budget, "SHARE", 0.0)
    generate = fleet.broken._generate

    def fail_long(request: Any, *others: Any) -> Any:
        if request.prompt_tokens > 50:
            raise InternalError("broken for long prompts")
        return generate(request, *others)

    monkeypatch.setattr(fleet.broken, "_generate", fail_long)
    for _ in range(12):
        fleet.client.generate(TokenIds((5, 6, 7)), sampling=SAMPLED, kv=KvChoice(policy="fp16"), timeout=60).result()
        assert fleet.ask().usage.decode_worker != fleet.broken_name
    assert fleet.ejected


def test_one_that_answers_all_but_requests_is_left_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its health service says SERVING and its room is free, and Begin waits for an answer without end."""
    monkeypatch.setattr(lease, "ADMISSION_SECONDS", 0.2)
    hanging = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(fleet.broken, "_read_begin", lambda messages: hanging.wait())
        for _ in range(10):
            assert fleet.ask().usage.decode_worker != fleet.broken_name
        assert fleet.ejected
        assert fleet.passed_over() == FAILURES_TO_EJECT
        hanging.set()


def broken_is_left_alone(fleet: Fleet) -> None:
    """Hold all requests to end elsewhere, and the broken worker to be ejected after its last allowed failure."""
    for _ in range(10):
        assert fleet.ask().usage.decode_worker != fleet.broken_name
    assert fleet.ejected
    assert fleet.passed_over() == FAILURES_TO_EJECT


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no memory for its decoder"),
        DataLossError("reads every Begin wrongly", "crc"),
        InvalidArgumentError("takes every request for a wrong one"),
        NotFoundError("has no such model"),
        DeadlineExceededError("its clock is wrong"),
    ],
)
def test_one_that_fails_every_begin_is_left_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """It admits nothing, so its room stays the largest."""

    def fail(messages: object) -> NoReturn:
        raise error

    monkeypatch.setattr(fleet.broken, "_read_begin", fail)
    broken_is_left_alone(fleet)


def test_a_request_that_all_workers_call_its_callers_fault_ejects_none(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(messages: object) -> NoReturn:
        raise InvalidArgumentError("of another opinion")

    monkeypatch.setattr(fleet.broken, "_read_begin", refuse)
    monkeypatch.setattr(fleet.sound, "_read_begin", refuse)
    for _ in range(2 * FAILURES_TO_EJECT):
        with pytest.raises(InvalidArgumentError, match="of another opinion"):
            fleet.ask()
    assert total(fleet.metrics, "decode_worker_ejected") == 0


@pytest.mark.parametrize("lie", [{"token_id": 2**32 - 1}, {"logprob": math.nan}], ids=["token", "logprob"])
def test_one_that_sends_what_no_model_generates_is_left_alone(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any]
) -> None:
    generate = fleet.broken._generate
    from_index = 1

    def lying(*arguments: Any) -> Iterator[Any]:
        for response in generate(*arguments):
            if response.HasField("token") and response.token.index >= from_index:
                response.token.MergeFrom(generation_pb2.Token(**lie))
            yield response

    monkeypatch.setattr(fleet.broken, "_generate", lying)
    broken_is_left_alone(fleet)
    # From token 2 on no other worker can go on.
    from_index = 2
    with pytest.raises(InternalError, match=f"decode worker {fleet.broken_name}: it sent"):
        # More slots than the other worker has.
        fleet.ask(Sampling(max_tokens=300, ignore_eos=True))


def test_one_that_works_again_is_found_by_a_trial(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    # An ejection is over at once, and so each request is a trial.
    monkeypatch.setattr(circuit_breaker, "EJECTION_SECONDS", 0.0)
    with failing_requests(fleet.broken, RuntimeError("broken")):
        for _ in range(FAILURES_TO_EJECT + 2):
            assert fleet.ask().usage.decode_worker != fleet.broken_name
        assert fleet.passed_over() == FAILURES_TO_EJECT + 2
    assert fleet.ask().usage.decode_worker == fleet.broken_name
    assert not fleet.ejected
    assert fleet.ask().usage.decode_worker == fleet.broken_name


def test_an_ejected_worker_is_asked_where_no_other_could_serve(fleet: Fleet) -> None:
    with failing_requests(fleet.broken, RuntimeError("broken")):
        for _ in range(FAILURES_TO_EJECT):
            fleet.ask()
    assert fleet.ejected
    # More slots than the other worker has.
    answer = fleet.ask(Sampling(max_tokens=300, ignore_eos=True))
    assert answer.usage.decode_worker == fleet.broken_name


def test_where_all_fail_the_client_gets_the_error_and_all_are_still_asked(fleet: Fleet) -> None:
    with (
        failing_requests(fleet.broken, RuntimeError("broken")),
        failing_requests(fleet.sound, RuntimeError("broken")),
    ):
        for _ in range(2 * FAILURES_TO_EJECT):
            with pytest.raises(InternalError, match="broken"):
                fleet.ask()
    assert len(fleet.ask().tokens) == SAMPLED.max_tokens


def test_reruns_are_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_budget, "RESERVE", 1)
    monkeypatch.setattr(retry_budget, "SHARE", 0.0)
    with failing_requests(fleet.broken, RuntimeError("broken")):
        fleet.ask()
        with pytest.raises(InternalError, match=fleet.broken_name):
            fleet.ask()


def test_a_request_that_moves_on_is_counted_once_in_each_stage(fleet: Fleet) -> None:
    fleet.ask()
    before = {stage: observed(fleet.metrics, stage) for stage in ("queue", "prefill", "encode", "transfer")}
    with failing_requests(fleet.broken, UnavailableError("the device is lost")):
        fleet.ask()
    assert fleet.passed_over() == 1
    assert {stage: observed(fleet.metrics, stage) - count for stage, count in before.items()} == dict.fromkeys(
        before, 1
    )


def observed(metrics: Metrics, stage: str) -> float:
    return sample(metrics, "request_duration_seconds_count", stage=stage)
