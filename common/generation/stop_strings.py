"""Ending text before a stop string, wherever the pieces of the text are cut."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string is complete in it.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first counts,
    as it would if each piece were one character; of two that end at the same place the longer one.

    Args:
        stop: strings of at least one character.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return text that no stop string can claim any more, and whether one was found.

        What might still be the start of a stop string is held back. After one is found nothing is left to say.
        """
        self._held += text
        found = [(at + len(one), at) for one in self._stop if (at := self._held.find(one)) >= 0]
        if found:
            _, start = min(found)
            before, self._held = self._held[:start], ""
            return before, True
        kept = self._undecided()
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain, False

    def flush(self) -> str:
        """Return what is held back: no stop string will be completed."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-length:]) for one in self._stop):
                return length
        return 0
