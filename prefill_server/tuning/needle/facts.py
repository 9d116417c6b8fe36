"""Needles: facts that no model can know and no reader of the haystack can guess."""

from dataclasses import dataclass

import numpy as np

LANDMARKS = ("lighthouse", "windmill", "monastery", "observatory", "vineyard", "shipyard", "quarry", "chapel")
TOWNS = ("Arlen", "Brosk", "Cedrin", "Dunmere", "Eskola", "Farrowby", "Galdun", "Hestra", "Ilvane", "Jorvey")


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        sentence: the needle.
        question: asks for it.
        lead: how the answer begins, up to the number.
        answer: the number, five digits.
    """

    sentence: str
    question: str
    lead: str
    answer: str


def fact(index: int) -> Fact:
    """Return the fact of this number, always the same; from 0."""
    draw = np.random.default_rng(index)
    place = f"the {draw.choice(LANDMARKS)} in {draw.choice(TOWNS)}"
    answer = str(draw.integers(10_000, 100_000))
    lead = f"The secret number of {place} is"
    return Fact(f"{lead} {answer}.", f"What is the secret number of {place}?", lead, answer)
