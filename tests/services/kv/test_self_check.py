"""`spectrumkv check` finds a deployment well that is, and says what is off with one that is not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectrumkv.client.cli.commands import demo
from spectrumkv.client.cli.commands.check import self_check
from spectrumkv.client.cli.main import main
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.decode_server import receiver
from tests.services.pair import Pair, running_pair
from tests.tiny_models import tiny_model


def test_a_sound_deployment_is_found_well(llama_pair: Pair) -> None:
    with llama_pair.client() as client:
        result = self_check(client, timeout=60, max_kl=0.5)
    assert result.problems == []
    assert 1 <= result.agreeing_tokens <= 32
    assert 0 <= result.kl < 0.5
    assert result.exact.usage.policy == "native"
    assert result.served.usage.budget_counted < result.exact.usage.budget_counted


def test_the_command_writes_json_and_exits_with_0(llama_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--server", f"127.0.0.1:{llama_pair.prefill_port}", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["recomputed_prompt_tokens"] == 0
    assert found["decode_workers"] == [f"127.0.0.1:{llama_pair.proxy.port}"]


def test_kv_that_arrives_wrong_without_a_checksum_noticing_is_found(
    llama_pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a defect in a codec or a kernel would: every byte is as it was sent, and the tensors are not.

    The codec of exact KV is sound. What harms both alike, the check does not see.
    """
    sound = receiver.KvReceiver._write

    def defective(self: receiver.KvReceiver, segments: list[KvSegment]) -> Any:
        found = sound(self, segments)
        for segment in segments:
            if not (segment.tiers == Tier.NATIVE).any():
                _, values = self._writer._views(segment)
                values.neg_()
        return found

    monkeypatch.setattr(receiver.KvReceiver, "_write", defective)
    assert main(["check", "--server", f"127.0.0.1:{llama_pair.prefill_port}"]) == 1
    captured = capsys.readouterr()
    assert "have a mean KL of" in captured.err
    assert "failed" in captured.out


@pytest.fixture(scope="module", params=[(512, True), (512, False), (2048, False), (96, False)], ids=str)
def small_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A model with a context of so many tokens, with or without a chat template."""
    context, chat = request.param
    directory = Path(shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp("small") / "model"))
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": context}
    (directory / "config.json").write_text(json.dumps(config))
    if not chat:
        (directory / "chat_template.jinja").unlink()
    with running_pair(directory) as pair:
        assert pair.prefill.context_length == context
        assert bool(pair.prefill.tokenizer.chat_template) == chat
        yield pair


def test_short_contexts_and_base_models_are_checked_or_refused_in_a_sentence(
    small_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["check", "--server", f"127.0.0.1:{small_pair.prefill_port}", "--json", "-"])
    captured = capsys.readouterr()
    if small_pair.prefill.context_length < 512:
        assert status == 1
        assert captured.err == (
            "FAILED_PRECONDITION: model has a context of 96 tokens, which is too short for the question that is "
            "asked here; try `spectrumkv generate` with a prompt of your own\n"
        )
    else:
        assert (status, captured.err) == (0, "")
        assert json.loads(captured.out)["prompt_tokens"] > 128


def test_the_demo_asks_them_too(small_pair: Pair) -> None:
    with small_pair.client() as client:
        if small_pair.prefill.context_length < 512:
            with pytest.raises(FailedPreconditionError, match="too short for the question"):
                demo.ask(Console(quiet=True), client, 1.0, None)
            return
        answers = [demo.ask(Console(quiet=True), client, budget, policy) for budget, policy in demo.RUNS]
    assert all(1 <= len(one.token_ids) <= demo.MAX_TOKENS for one in answers)


@pytest.mark.parametrize("characters", [400, 760, 3000, 10**6])
def test_the_stretch_of_the_document_has_the_answer(characters: int) -> None:
    stretch = demo.document(characters)
    assert len(stretch) == min(characters, len(demo.document()))
    assert "The first keeper was Josiah Penrose" in stretch


def test_a_decode_service_is_named_as_such(llama_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--server", f"127.0.0.1:{llama_pair.decode_port}"]) == 1
    assert f"{FailedPreconditionError.code}: 127.0.0.1:" in capsys.readouterr().err
