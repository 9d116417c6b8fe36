"""The probe's steps, announced one by one."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeStep:
    """What the probe is about to do.

    Attributes:
        number: from 1.
        total: steps of the whole probe; more where the search for layers follows, which may end before that.
        doing: in words.
    """

    number: int
    total: int
    doing: str

    def __str__(self) -> str:
        return f"probe, step {self.number} of {self.total}: {self.doing}"


OnProgress = Callable[[ProbeStep], object]


class ProbeProgress:
    """Counts the steps of a probe and announces each one.

    Args:
        on_progress: told of each.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._total = 0
        self._on_progress = on_progress
        self._number = 0

    def expect(self, steps: int) -> None:
        """Add steps that will be needed."""
        self._total += steps

    def begin(self, doing: str) -> None:
        """Announce the next step."""
        self._number += 1
        self._on_progress(ProbeStep(self._number, self._total, doing))
