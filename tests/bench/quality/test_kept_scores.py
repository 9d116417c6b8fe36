"""Scores of `quality --scores` outlive a process, and belong to one text, model and state of the code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.quality.kept_scores import KeptScores, sources_digest
from spectrumkv.bench.quality.scoring import WindowScore
from spectrumkv.common.errors import InvalidArgumentError
from tests.bench.conftest import TEXT
from tests.tiny_models import tiny_model

SCORE = WindowScore(64, 130.25, 128.5, 0.1, 60, 30.5, 100, 0.25)
METHOD = SimpleNamespace(policy="greedy", codec="absmax", scorer="attention", scope="layer", budget=0.3)
OTHER = SimpleNamespace(policy="greedy", codec="absmax", scorer="attention", scope="layer", budget=0.5)


def quality(tmp_path: Path, policies: str, scores: Path | None, context: int = 96) -> int:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    kept = () if scores is None else ("--scores", str(scores))
    return main(
        [
            "quality", "--text", str(text), "--context", str(context), "--scored", "16", "--windows", "2",
            "--policies", policies, "--budgets", "0.5,0.3", "--model", str(tiny_model("llama")), "--int4", "on",
            "--json", str(tmp_path / "result.json"), *kept,
        ]
    )  # fmt: skip


def rows(tmp_path: Path) -> list[object]:
    found: list[object] = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    return found


def test_run_that_was_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = tmp_path / "scores.jsonl"
    assert quality(tmp_path, "uniform-int8,greedy", None) == 0
    expected = rows(tmp_path)
    assert quality(tmp_path, "uniform-int8", scores) == 0
    lines = scores.read_text(encoding="utf-8").splitlines(keepends=True)
    # The process ends while it writes the score of the second window.
    scores.write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    assert quality(tmp_path, "uniform-int8,greedy", scores) == 0
    assert rows(tmp_path) == expected

    def refuse(served: ServedModel, token_ids: object) -> None:
        raise AssertionError("everything has a score")

    monkeypatch.setattr(ServedModel, "prefill", refuse)
    assert quality(tmp_path, "uniform-int8,greedy", scores) == 0
    assert rows(tmp_path) == expected


def test_scores_of_another_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "scores.jsonl"
    assert quality(tmp_path, "uniform-int8", scores) == 0
    before = scores.read_bytes()
    assert quality(tmp_path, "uniform-int8", scores, context=80) == 1
    assert "has context 96, and this is 80" in " ".join(capsys.readouterr().err.split())
    assert scores.read_bytes() == before


def test_scores_come_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    KeptScores(path, {"context": 96}).add(3, METHOD, SCORE)
    again = KeptScores(path, {"context": 96})
    assert again.has(3, METHOD)
    assert not again.has(3, OTHER)
    assert not again.has(2, METHOD)
    assert again.get(3, METHOD) == SCORE


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("no JSON\n", "Expecting value"),
        ("[1]\n", r"context \[1\], and this is 96"),
        ('{"context": 96}\n{"key": [1]}\n', "line 2"),
        ('{"context": 96}\n{"key": [1], "score": {"tokens": 1}}\n', "line 2"),
        ('{"context": 96}\n7\n', "line 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=what):
        KeptScores(path, {"context": 96})
    assert path.read_text(encoding="utf-8") == content


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="allowed: a file"):
        KeptScores(tmp_path, {})


def test_sources_have_one_digest() -> None:
    assert len(sources_digest()) == 64
    assert sources_digest() == sources_digest()
