"""Prompt tokens that decode computes again are counted where the model is called, and everybody hears of them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from spectrumkv.client.cli.main import main
from spectrumkv.client.request import KvChoice
from spectrumkv.common.rpc.decode_protocol import tokens_and_finished
from spectrumkv.decode_server.model_runner import DecodeRow, ModelRunner
from spectrumkv.prefill_server.workers import lease
from tests.services.generation.test_generation import complete, prompt
from tests.services.pair import Pair, sample

AGAIN = 3


@pytest.fixture
def recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make decode run the last tokens of every prompt through its model before it generates."""
    sound = ModelRunner.logits

    def logits(runner: ModelRunner, rows: Sequence[DecodeRow]) -> torch.Tensor:
        for row in rows:
            prompt_token_ids = row.answer.prompt_token_ids
            if row.position == len(prompt_token_ids):
                for position in range(len(prompt_token_ids) - AGAIN, len(prompt_token_ids)):
                    sound(runner, [DecodeRow(row.answer, prompt_token_ids[position], position)])
        return sound(runner, rows)

    monkeypatch.setattr(ModelRunner, "logits", logits)


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each Finished on a Decode stream says of recomputed tokens."""
    said: list[int] = []

    def listening(responses: Iterator[Any], vocab_size: int, answers: Iterable[int]) -> Iterator[Any]:
        for response in tokens_and_finished(responses, vocab_size, answers):
            if response.WhichOneof("message") == "finished":
                said.append(response.finished.recomputed_prompt_tokens)
            yield response

    monkeypatch.setattr(lease, "tokens_and_finished", listening)
    return said


def counted(pair: Pair) -> float:
    return sample(pair.decode_metrics, "prompt_tokens_recomputed_total")


def test_a_sound_service_computes_no_prompt_token_again(llama_pair: Pair, finished: list[int]) -> None:
    before = counted(llama_pair)
    completion = complete(llama_pair, prompt(30), KvChoice(policy="native"), max_tokens=4)
    assert completion.usage.recomputed_prompt_tokens == 0
    assert finished == [0]
    assert counted(llama_pair) == before


@pytest.mark.usefixtures("recomputing")
@pytest.mark.parametrize("kv", [KvChoice(), KvChoice(policy="native"), KvChoice(policy="greedy")])
def test_recomputed_tokens_reach_usage_and_metric(llama_pair: Pair, finished: list[int], kv: KvChoice) -> None:
    before = counted(llama_pair)
    completion = complete(llama_pair, prompt(30), kv, max_tokens=4)
    assert len(completion.token_ids) == 4
    assert completion.usage.recomputed_prompt_tokens == AGAIN
    assert finished == [AGAIN]
    assert counted(llama_pair) == before + AGAIN


@pytest.mark.usefixtures("recomputing")
def test_the_check_finds_them(llama_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--server", f"127.0.0.1:{llama_pair.prefill_port}", "--json", "-"]) == 1
    captured = capsys.readouterr()
    # The check sends two requests.
    assert f"decode computed {2 * AGAIN} prompt tokens again" in captured.err
    assert json.loads(captured.out)["recomputed_prompt_tokens"] == 2 * AGAIN
