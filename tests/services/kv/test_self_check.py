"""`spectrumkv check` finds a deployment well that is, and says what is off with one that is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.client.cli.check import self_check
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

    def defective(self: receiver.KvReceiver, segment: KvSegment) -> Any:
        found = sound(self, segment)
        if not (segment.tiers == Tier.NATIVE).any():
            end = segment.first_token + segment.tiers.numel()
            self._allocation.values(segment.layer, segment.first_token, end).neg_()
        return found

    monkeypatch.setattr(receiver.KvReceiver, "_write", defective)
    assert main(["check", "--server", f"127.0.0.1:{llama_pair.prefill_port}"]) == 1
    captured = capsys.readouterr()
    assert "have a mean KL of" in captured.err
    assert "failed" in captured.out


@pytest.mark.slow
def test_a_model_that_does_not_chat_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(shutil.copytree(tiny_model("gemma3_text"), tmp_path / "model"))
    (directory / "chat_template.jinja").unlink()
    with running_pair(directory) as pair:
        assert main(["check", "--server", f"127.0.0.1:{pair.prefill_port}"]) == 0
    assert "passed" in capsys.readouterr().out


def test_a_decode_service_is_named_as_such(llama_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--server", f"127.0.0.1:{llama_pair.decode_port}"]) == 1
    assert f"{FailedPreconditionError.code}: 127.0.0.1:" in capsys.readouterr().err
