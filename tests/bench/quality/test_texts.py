import ast
from pathlib import Path

import pytest

from spectrumkv.bench.quality.dialogue import Turn, transcript
from spectrumkv.bench.quality.texts import CODE_CHARACTERS, cut, load_text, read_text, standard_library, text_digest
from spectrumkv.common.errors import InvalidArgumentError


def test_code_is_the_standard_library_and_always_the_same() -> None:
    text = load_text(Path("code"))
    assert text == standard_library()
    assert len(text) == CODE_CHARACTERS
    # It begins with whole modules, argparse among them.
    assert ast.__doc__
    assert ast.__doc__.strip().splitlines()[0] in text
    assert "class ArgumentParser(" in text


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "code"
    path.write_text("not Python's", encoding="utf-8")
    assert load_text(path) == "not Python's"


def test_a_transcript_is_plain_text() -> None:
    assert transcript([Turn("user", "Who?"), Turn("assistant", "I.")]) == "User: Who?\n\nAssistant: I."


class Letters:
    """A token a letter; with a beginning-of-sequence token where asked."""

    def __init__(self, bos_token_id: int | None = None, adds_it: bool = False) -> None:
        self.bos_token_id = bos_token_id
        self._adds_it = adds_it

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [self.bos_token_id or 0, *ids] if add_special_tokens and self._adds_it else ids


def spell(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def test_windows_follow_each_other_and_share_no_target() -> None:
    windows = cut(Letters(), "abcdefghijklmnop", context=3, scored=2, skip=1, count=2)
    assert [(one.index, spell(one.context), spell(one.following), spell(one.targets)) for one in windows] == [
        (1, "fgh", "ij", "jk"),
        (2, "klm", "no", "op"),
    ]


def test_zero_windows_are_all_that_are_left() -> None:
    assert [one.index for one in cut(Letters(), "abcdefghijklmnop", 3, 2, 1, 0)] == [1, 2]
    # The last window needs a target beyond its end.
    assert [one.index for one in cut(Letters(), "abcdefghijklmno", 3, 2, 0, 0)] == [0, 1]


def test_a_context_begins_as_the_tokenizer_begins_texts() -> None:
    (window,) = cut(Letters(ord("^"), adds_it=True), "abcdefgh", 3, 2, 0, 1)
    assert spell(window.context) == "^bc"
    (window,) = cut(Letters(ord("^"), adds_it=False), "abcdefgh", 3, 2, 0, 1)
    assert spell(window.context) == "abc"


@pytest.mark.parametrize(
    ("context", "scored", "skip", "count", "said"),
    [
        (1, 2, 0, 1, "--context is 1"),
        (3, 0, 0, 1, "--scored is 0"),
        (3, 2, -1, 1, "--skip-windows is -1"),
        (3, 2, 0, -1, "--windows is -1"),
        (3, 2, 0, 4, "3 windows of 3 \\+ 2"),
        (3, 2, 3, 0, "asks for others"),
    ],
)
def test_impossible_windows_are_refused(context: int, scored: int, skip: int, count: int, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        cut(Letters(), "abcdefghijklmnop", context, scored, skip, count)


def test_texts_are_read_or_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("Grüße", encoding="utf-8")
    bad.write_bytes(b"\xff\xfe\xfa")
    assert read_text(good) == "Grüße"
    assert len(text_digest("Grüße")) == 64
    with pytest.raises(InvalidArgumentError, match="not UTF-8"):
        read_text(bad)
    with pytest.raises(InvalidArgumentError, match="No such file"):
        read_text(tmp_path / "none")
