import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.prefill_server.tuning.needle.haystack import fact, haystack

NEEDLE = "The secret number of the mill in Oster is 12345."


def test_the_haystack_is_long_and_never_repeats_itself() -> None:
    sentences = haystack(0).sentences
    assert len("".join(sentences).split()) > 5900
    assert len({sentence.strip() for sentence in sentences}) == len(sentences)


def test_the_haystack_holds_no_number_that_could_be_an_answer() -> None:
    text = "".join(haystack(0).sentences)
    assert not any(character.isdigit() for character in text)
    assert "secret number" not in text


def test_needles_lie_in_different_prose() -> None:
    texts = ["".join(haystack(rotation).sentences) for rotation in range(5)]
    assert len({text[:200] for text in texts}) == 5
    assert len({"".join(sorted(text)) for text in texts}) == 1


@given(st.floats(0, 1), st.integers(0, 100), st.integers(1, 302))
def test_a_needle_stands_between_sentences_near_its_depth(depth: float, rotation: int, count: int) -> None:
    prose = haystack(rotation).first(count)
    text = prose.text(NEEDLE, depth)
    before, found, after = text.partition(NEEDLE)
    assert found
    assert before == "" or before.rstrip().endswith((".", "!", "?"))
    assert (before + after.lstrip(" ")).split() == "".join(prose.sentences).split()
    whole = sum(len(sentence) for sentence in prose.sentences)
    longest = max(len(sentence) for sentence in prose.sentences)
    assert abs(len(before) - depth * whole) <= longest / 2 + 2


@pytest.mark.parametrize(("depth", "start"), [(0.0, True), (1.0, False)])
def test_the_ends_are_depths_0_and_1(depth: float, start: bool) -> None:
    text = haystack(0).first(40).text(NEEDLE, depth)
    assert text.startswith(NEEDLE) is start
    assert text.endswith(NEEDLE) is not start


def test_paragraphs_survive_the_needle() -> None:
    sentences = haystack(0).sentences
    end_of_paragraph = next(place for place, one in enumerate(sentences) if one.endswith("\n\n")) + 1
    depth = sum(map(len, sentences[:end_of_paragraph])) / sum(map(len, sentences))
    text = haystack(0).text(NEEDLE, depth)
    assert f" {NEEDLE}\n\n" in text
    assert text.count("\n\n") == "".join(sentences).strip().count("\n\n")


@given(st.integers(0, 10_000))
def test_a_fact_is_always_the_same_and_says_what_is_asked(index: int) -> None:
    one = fact(index)
    assert one == fact(index)
    assert one.sentence == f"{one.lead} {one.answer}."
    assert one.question == one.lead.replace("The secret", "What is the secret").removesuffix(" is") + "?"
    assert len(one.answer) == 5
    assert one.answer.isdigit()


def test_facts_differ() -> None:
    assert len({fact(index).answer for index in range(50)}) == 50
