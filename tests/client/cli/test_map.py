"""`spectrumkv generate --map`: in colours, in marks, and as a picture."""

import builtins
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from spectrumkv.client.cli.main import main
from spectrumkv.client.cli.map_text import print_map
from spectrumkv.client.completion import PromptToken
from spectrumkv.client.kv_map import LEVELS, KvMap, level_of
from spectrumkv.v1 import prefill_pb2
from tests.client.fake_servers import FakePrefill, finished, token

TEXTS = ("Why", " is", " the\n", "sky", "\x1b[2J", " $blue$ 🙂?")
BITS = (16.0, 4.25, 0.0, 8.25, 2.5, 3.5)
PNG = b"\x89PNG\r\n\x1a\n"


def answer_with_map(request: prefill_pb2.GenerateRequest, context: Any) -> Iterator[prefill_pb2.GenerateResponse]:
    tokens = [prefill_pb2.PromptToken(token_id=place, text=text) for place, text in enumerate(TEXTS)]
    yield prefill_pb2.GenerateResponse(prompt_tokens=prefill_pb2.PromptTokens(tokens=tokens))
    yield token(0, "Blue", ends="STOP")
    end = finished(1)
    end.finished.kv_map.bits.extend(BITS)
    if request.kv_map == prefill_pb2.KV_MAP_DETAIL_LAYERS:
        end.finished.kv_map.layers.extend(prefill_pb2.KvMapLayer(bits=BITS) for _ in range(3))
    yield end


@pytest.fixture
def mapped(prefill: FakePrefill) -> FakePrefill:
    prefill.answer = answer_with_map
    return prefill


def printed(width: int = 40, texts: Sequence[str] = TEXTS, **console: Any) -> str:
    out = Console(file=StringIO(), width=width, **console)
    tokens = [PromptToken(place, text, None, ()) for place, text in enumerate(texts)]
    print_map(out, tokens, KvMap(BITS[: len(texts)]))
    return out.file.getvalue()


def test_levels_begin_where_they_say() -> None:
    assert [level_of(bits).mark for bits in (0.0, 0.1, 2.0, 3.99, 4.25, 6, 8.25, 12, 16, 32)] == list("·023468FFF")
    assert [level.least for level in LEVELS] == sorted(level.least for level in LEVELS)


def test_without_colours_marks_stand_below_the_text() -> None:
    lines = printed().splitlines()
    assert lines[:4] == ["Why is the↵", "FFF444·····", "sky [2J $blue$ 🙂?", "888222233333333333"]
    assert " 4  4 to 5 bits: 1" in lines
    assert not any("6 to 8 bits" in line for line in lines)
    assert lines[-1] == f"mean: {sum(BITS) / 6:.2f} bits"


def test_no_line_is_wider_than_the_terminal() -> None:
    text, marks = printed(width=7).splitlines()[:8:2], printed(width=7).splitlines()[1:8:2]
    assert text == ["Why is", " the↵", "sky [2J", " $blue$"]
    assert [len(line) for line in marks] == [len(line) for line in text]


def test_lines_break_between_words() -> None:
    texts = ["lost", " on", " a", " wh", "al", "ing"]
    assert printed(width=13, texts=texts).splitlines()[:4:2] == ["lost on a", " whaling"]
    # A word that no line has room for is broken where the line ends.
    assert printed(width=5, texts=texts).splitlines()[:8:2] == ["lost", " on a", " whal", "ing"]


def test_with_colours_each_token_has_the_colour_of_its_level() -> None:
    shown = printed(force_terminal=True, color_system="truecolor", no_color=False, _environ={})
    assert "FFF" not in shown
    for bits in BITS:
        red, green, blue = (int(level_of(bits).colour[at : at + 2], 16) for at in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}" in shown
    # The prompt cannot clear the screen.
    assert "\x1b[2J" not in shown


def test_map_on_the_terminal(mapped: FakePrefill, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Why?", "--server", mapped.address, "--map"]) == 0
    out, err = capsys.readouterr()
    assert out == "Blue\n"
    assert "FFF444·····" in err
    (request,) = mapped.requests
    assert (request.echo, request.kv_map) == (True, prefill_pb2.KV_MAP_DETAIL_TOKENS)


def test_map_as_a_picture(mapped: FakePrefill, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "map.png"
    assert main(["generate", "Why?", "--server", mapped.address, "--map", str(file)]) == 0
    assert file.read_bytes().startswith(PNG)
    assert "FFF444" not in capsys.readouterr().err
    assert mapped.requests[0].kv_map == prefill_pb2.KV_MAP_DETAIL_LAYERS


def test_nothing_is_asked_where_there_is_no_flag(mapped: FakePrefill) -> None:
    assert main(["generate", "Why?", "--server", mapped.address]) == 0
    assert (mapped.requests[0].echo, mapped.requests[0].kv_map) == (False, 0)


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def absent(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)


def test_pictures_that_cannot_be_drawn_are_refused_before_anything_is_sent(
    mapped: FakePrefill, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--map", "Why is the sky blue?"])
    assert "'Why is the sky blue?'; allowed: a file that ends in .png, or nothing" in capsys.readouterr().err
    assert main(["generate", "x", "--server", mapped.address, "--map", str(tmp_path / "no" / "a.png")]) != 0
    assert "its folder does not exist" in capsys.readouterr().err
    without_matplotlib(monkeypatch)
    assert main(["generate", "x", "--server", mapped.address, "--map", str(tmp_path / "a.png")]) != 0
    assert "draws with matplotlib, which is not installed; pip install" in " ".join(capsys.readouterr().err.split())
    assert mapped.requests == []
