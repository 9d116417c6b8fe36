from pathlib import Path

import pytest

from spectrumkv.bench.quality import dialogue
from spectrumkv.bench.quality.dialogue import FOLLOW_UPS, hold
from spectrumkv.bench.quality.texts import load_text
from spectrumkv.common.model.load import LoadedModel


def test_dialogues_take_turns_and_are_drawn_by_a_seed(tiny_llama: LoadedModel) -> None:
    openings = ("Why is the sea salty?", "Who are you?")
    held = hold(tiny_llama, openings, turns=2, answer_tokens=6)
    assert [[turn.role for turn in one] for one in held] == [["user", "assistant"] * 2] * 2
    assert [one[0].content for one in held] == list(openings)
    assert [one[2].content for one in held] == list(FOLLOW_UPS[:2])
    assert held[0][1].content != held[1][1].content
    assert held == hold(tiny_llama, openings, turns=2, answer_tokens=6)


def test_dialogues_are_made_once(tmp_path: Path, tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRUMKV_CACHE", str(tmp_path))
    loads: list[int] = []
    monkeypatch.setattr(dialogue, "load_model", lambda: loads.append(1) or tiny_llama)
    monkeypatch.setattr(dialogue, "OPENINGS", ("Who are you?",))
    monkeypatch.setattr(dialogue, "ANSWER_TOKENS", 4)
    first = load_text(Path("dialogue"))
    assert first.startswith("User: Who are you?\n\nAssistant: ")
    assert first.count("User: ") == dialogue.TURNS
    assert load_text(Path("dialogue")) == first
    assert loads == [1]
