"""`vllm-quality` and `vllm-niah` against stand-ins for the servers."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.vllm.predictions import PROCESSOR
from tests.bench.conftest import TEXT
from tests.bench.vllm.fake_servers import BYTES_OF_A_TRANSFER, FakePair, logprobs, serving
from tests.tiny_models import tiny_model

WINDOWS, CONTEXT, SCORED = 2, 64, 8


def command(name: str, pair: FakePair, folder: Path, *flags: str) -> int:
    return main(
        [
            name, "--prefill", pair.url, "--decode", pair.url, "--model", str(tiny_model("llama")),
            "--budgets", "0.5", "--scores", str(folder / "scores.jsonl"), "--json", str(folder / "result.json"),
            *flags,
        ]
    )  # fmt: skip


def quality(pair: FakePair, folder: Path, *flags: str) -> int:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    shape = ("--windows", str(WINDOWS), "--context", str(CONTEXT), "--scored", str(SCORED))
    return command("vllm-quality", pair, folder, "--text", str(text), *shape, *flags)


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "result.json").read_text(encoding="utf-8"))["rows"]
    return found


def test_quality_compares_with_decodes_own_predictions(tmp_path: Path) -> None:
    with serving(FakePair()) as pair:
        assert quality(pair, tmp_path) == 0
    native, lossy = rows(tmp_path)
    exact, received = logprobs(0.0), logprobs(0.5)
    expected = sum(2.718281828459045**value * (value - received[token]) for token, value in exact.items())
    assert (native["policy"], native["kl"], native["windows"]) == ("native", 0, WINDOWS)
    assert lossy["kl"] == pytest.approx(expected)
    layers, kv_heads, head_dim = 3, 2, 64
    assert lossy["budget_counted"] == BYTES_OF_A_TRANSFER / (layers * 2 * kv_heads * head_dim * CONTEXT * 2)
    assert "budget_nominal" not in lossy
    reads = [body for body in pair.asked if "vllm_xargs" in body]
    assert len(reads) == WINDOWS * 3
    assert all(len(body["prompt"]) == CONTEXT + 1 and body["max_tokens"] == SCORED for body in reads)
    # Neither server may find a prompt in its prefix cache.
    assert len({body["cache_salt"] for body in pair.asked}) == len(pair.asked)


def test_quality_goes_on_where_it_ended(tmp_path: Path) -> None:
    with serving(FakePair()) as pair:
        assert quality(pair, tmp_path) == 0
        first, asked = rows(tmp_path), len(pair.asked)
        scores = tmp_path / "scores.jsonl"
        lines = scores.read_text(encoding="utf-8").splitlines(keepends=True)
        scores.write_text("".join(lines[:-1]), encoding="utf-8")
        assert quality(pair, tmp_path) == 0
    assert rows(tmp_path) == first
    # Once for prefill, once over exact KV, once over received KV.
    assert len(pair.asked) == asked + 3


@pytest.mark.parametrize(
    ("pair", "flags", "what"),
    [
        (FakePair(forces=False), (), PROCESSOR),
        (FakePair(computes=True), (), "KV did not come"),
        (FakePair(), ("--logprobs", "0"), "--logprobs is 0; allowed: 1 or more, or -1 for all"),
    ],
)
def test_quality_refuses_what_it_cannot_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: FakePair, flags: tuple[str, ...], what: str
) -> None:
    with serving(pair):
        assert quality(pair, tmp_path, *flags) == 1
    assert what in " ".join(capsys.readouterr().err.split())


def test_needles_are_counted_and_kept(tmp_path: Path) -> None:
    with serving(FakePair(text=" 0 and nothing else")) as pair:
        assert command("vllm-niah", pair, tmp_path, "--context", "256", "--depths", "2") == 0
        asked = len(pair.asked)
        assert command("vllm-niah", pair, tmp_path, "--context", "256", "--depths", "2") == 0
    assert len(pair.asked) == asked
    native, lossy = rows(tmp_path)
    assert (native["found"], native["total"], lossy["policy"], lossy["budget"]) == (0, 2, "spectral", 0.5)
    assert [one["depth"] for one in lossy["by_depth"]] == pytest.approx([1 / 3, 2 / 3])
