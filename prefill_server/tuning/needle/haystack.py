"""The haystack, and the needles that prompts hide in it.

The haystack is a long text about many things, none of them the question's. A needle is a fact that no model can know
and no reader of the haystack can guess.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate

import numpy as np

LANDMARKS = ("lighthouse", "windmill", "monastery", "observatory", "vineyard", "shipyard", "quarry", "chapel")
TOWNS = ("Arlen", "Brosk", "Cedrin", "Dunmere", "Eskola", "Farrowby", "Galdun", "Hestra", "Ilvane", "Jorvey")
# Paragraphs by which the text starts later from one needle to the next, so that needles lie in different prose.
PARAGRAPH_STRIDE = 7


@dataclass(frozen=True)
class Fact:
    """Holds a fact, and how to ask for it.

    Attributes:
        sentence: the needle.
        question: asks for the number.
        lead: how the answer begins, up to the number.
        answer: the number, five digits.
    """

    sentence: str
    question: str
    lead: str
    answer: str


def fact(index: int) -> Fact:
    """Return fact number `index`, counted from 0: the same fact for the same number, always."""
    draw = np.random.default_rng(index)
    place = f"the {draw.choice(LANDMARKS)} in {draw.choice(TOWNS)}"
    answer = str(draw.integers(10_000, 100_000))
    lead = f"The secret number of {place} is"
    return Fact(f"{lead} {answer}.", f"What is the secret number of {place}?", lead, answer)


@dataclass(frozen=True)
class Haystack:
    """Holds sentences in reading order.

    Attributes:
        sentences: each with the white space that follows it: a blank, or a blank line at a paragraph's end.
    """

    sentences: tuple[str, ...]

    def text(self, needle: str, depth: float) -> str:
        """Return the text with the needle between two of its sentences, or at one of its ends.

        Args:
            needle: a sentence.
            depth: share of the text's characters that come before the needle, from 0 to 1. The needle goes to the
                nearest end of a sentence.
        """
        count = self._sentences_before(depth)
        before = "".join(self.sentences[:count])
        after = "".join(self.sentences[count:])
        # The needle belongs to the paragraph before it, and takes over the white space that follows that.
        gap = before[len(before.rstrip()) :] or " "
        return f"{before.rstrip()} {needle}{gap}{after}".strip()

    def first(self, count: int) -> "Haystack":
        """Return the first `count` sentences."""
        return Haystack(self.sentences[:count])

    def _sentences_before(self, depth: float) -> int:
        """Return how many sentences come before the needle."""
        ends = [0, *accumulate(len(sentence) for sentence in self.sentences)]
        wanted = depth * ends[-1]
        above = bisect_left(ends, wanted)
        if above == 0:
            return 0
        return above if ends[above] - wanted <= wanted - ends[above - 1] else above - 1


def haystack(rotation: int) -> Haystack:
    """Return the whole haystack, about 7,200 words, from the paragraph that `rotation` picks as the first."""
    paragraphs = _paragraphs()
    start = rotation * PARAGRAPH_STRIDE % len(paragraphs)
    return Haystack(tuple(sentence for one in paragraphs[start:] + paragraphs[:start] for sentence in one))


@cache
def _paragraphs() -> tuple[tuple[str, ...], ...]:
    """Return the sentences of each paragraph, white space included."""
    text = (files("spectrumkv.prefill_server.tuning.needle") / "haystack.txt").read_text(encoding="utf-8")
    return tuple(
        tuple(re.findall(r".+?[.!?](?: |\n\n)", f"{paragraph}\n\n")) for paragraph in text.strip().split("\n\n")
    )
