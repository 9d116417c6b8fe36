"""The haystack: a long text about many things, none of them the question's."""

import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate

# Paragraphs by which the text starts later from one needle to the next, so that needles lie in different prose.
PARAGRAPH_STRIDE = 7


@dataclass(frozen=True)
class Haystack:
    """Sentences in reading order.

    Attributes:
        sentences: each with the white space that follows it: a blank, or a blank line at a paragraph's end.
    """

    sentences: tuple[str, ...]

    def text(self, needle: str, depth: float) -> str:
        """Return the text with the needle between two of its sentences, or at one of its ends.

        Args:
            needle: a sentence.
            depth: share of the text's characters that come before the needle, from 0 to 1; the nearest end of a
                sentence is taken.
        """
        place = self._place(depth)
        before = "".join(self.sentences[:place])
        after = "".join(self.sentences[place:])
        # Keeping to the paragraph that it follows, the needle takes over the white space.
        gap = before[len(before.rstrip()) :] or " "
        return f"{before.rstrip()} {needle}{gap}{after}".strip()

    def first(self, count: int) -> "Haystack":
        """Return the first `count` sentences."""
        return Haystack(self.sentences[:count])

    def _place(self, depth: float) -> int:
        """How many sentences come before the needle."""
        ends = [0, *accumulate(len(sentence) for sentence in self.sentences)]
        wanted = depth * ends[-1]
        above = bisect_left(ends, wanted)
        if above == 0:
            return 0
        return above if ends[above] - wanted <= wanted - ends[above - 1] else above - 1


def haystack(rotation: int) -> Haystack:
    """Return the whole haystack, about 6,000 words, starting at a paragraph that depends on `rotation`."""
    paragraphs = _paragraphs()
    start = rotation * PARAGRAPH_STRIDE % len(paragraphs)
    return Haystack(tuple(sentence for one in paragraphs[start:] + paragraphs[:start] for sentence in one))


@cache
def _paragraphs() -> tuple[tuple[str, ...], ...]:
    """The sentences of each paragraph, white space included."""
    text = (files("spectrumkv.prefill_server.tuning.needle") / "haystack.txt").read_text(encoding="utf-8")
    return tuple(
        tuple(re.findall(r".+?[.!?](?: |\n\n)", f"{paragraph}\n\n")) for paragraph in text.strip().split("\n\n")
    )
