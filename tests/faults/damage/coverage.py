"""A small coverage-guided fuzzer: inputs that reach new lines of the code under test are kept and mutated further."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

Edge = tuple[CodeType, int, int]
LENGTHS_AT_MOST = 1 << 16


class EdgeCoverage:
    """Records which line followed which, in functions of the given source files.

    Args:
        files: names as in `__file__`.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._files = frozenset(files)
        self.seen: set[Edge] = set()
        self._fresh = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        previous = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(previous)

    def new_edges(self) -> bool:
        """Whether there were any since the last call."""
        fresh, self._fresh = self._fresh, False
        return fresh

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        last = 0

        def follow(inner: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            edge = (inner.f_code, last, inner.f_lineno)
            last = inner.f_lineno
            if edge not in self.seen:
                self.seen.add(edge)
                self._fresh = True
            return follow

        return follow


def mutated(data: bytes, corpus: Sequence[bytes], chance: random.Random) -> bytes:
    """Change a few places of `data`, or graft a piece of another input onto it."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes((chance.choice((0, 1, 2, 3, 4, 127, 128, 255, chance.randrange(256))),))
        elif kind == 2:
            width = chance.choice((2, 4))
            edge = chance.choice((0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), chance.randrange(64)))
            changed[at : at + width] = edge.to_bytes(width, "little")
        elif kind == 3:
            del changed[at : at + chance.choice((1, 2, 16, 100))]
        else:
            other = chance.choice(corpus)
            start = chance.randrange(len(other) + 1)
            changed[at:at] = other[start : start + chance.choice((1, 16, 64, 1000))]
    return bytes(changed[:LENGTHS_AT_MOST])


def fuzz(
    target: Callable[[bytes], None], seeds: Sequence[bytes], files: Sequence[str], runs: int, chance: random.Random
) -> tuple[int, int]:
    """Call `target` with `runs` inputs; what it raises is a finding.

    Returns:
        How many inputs the corpus has grown to, and how many edges were seen.
    """
    coverage = EdgeCoverage(files)
    corpus = list(seeds)
    for number in range(runs):
        data = corpus[number] if number < len(seeds) else mutated(chance.choice(corpus), corpus, chance)
        with coverage.recording():
            target(data)
        if coverage.new_edges() and number >= len(seeds):
            corpus.append(data)
    return len(corpus), len(coverage.seen)
