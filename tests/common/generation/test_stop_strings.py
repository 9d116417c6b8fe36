import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.generation.text import StopStrings

# Few letters, so that stop strings overlap themselves, each other and the cuts.
TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def pass_through(stop: list[str], pieces: list[str]) -> tuple[str, bool, list[str]]:
    """All text that comes out, whether a stop string was found, and the text that was certain after each piece."""
    strings, out, certain = StopStrings(stop), "", []
    for piece in pieces:
        text, found = strings.push(piece)
        out += text
        certain.append(out)
        if found:
            return out, True, certain
    return out + strings.flush(), False, certain


def first_complete(stop: list[str], text: str) -> int | None:
    """Where the stop string starts that is complete first, by looking at every prefix of the text."""
    for end in range(len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            return min(starts)
    return None


@given(stop=STOPS, pieces=st.lists(TEXT, max_size=10))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(stop: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    start = first_complete(stop, text)
    out, found, _ = pass_through(stop, pieces)
    assert (out, found) == ((text, False) if start is None else (text[:start], True))
    assert pass_through(stop, list(text))[:2] == pass_through(stop, [text])[:2] == (out, found)


@given(stop=STOPS, text=TEXT)
def test_no_more_is_held_back_than_what_may_start_a_stop_string(stop: list[str], text: str) -> None:
    _, found, certain = pass_through(stop, list(text))
    for seen, out in enumerate(certain[: -1 if found else None], 1):
        held = text[len(out) : seen]
        assert text.startswith(out)
        assert not held or any(one.startswith(held) for one in stop)


@pytest.mark.parametrize(
    ("stop", "pieces", "text"),
    [
        (["END"], ["END", "x"], ""),
        (["END"], ["a EN", "D b"], "a "),
        (["END"], ["a END b END"], "a "),
        (["END"], ["EEN", "DEND"], "E"),
        (["aab"], ["a", "a", "a", "b"], "a"),
        (["\n\n", "\n"], ["x\n\ny"], "x"),
        (["abcd", "bc"], ["abcd"], "a"),
        (["bcd", "abcd"], ["x", "abc", "d"], "x"),
        (["né"], ["n", "é"], ""),
    ],
)
def test_stop_strings_that_straddle_overlap_and_lie_in_each_other(
    stop: list[str], pieces: list[str], text: str
) -> None:
    assert pass_through(stop, pieces)[:2] == (text, True)
