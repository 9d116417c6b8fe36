"""Keep the scores of windows in a file while `quality` measures, so that a run that was cut goes on where it ended.

A first line says what was measured, and every other line is one method on one window. Methods that are added later
are measured on the same windows; what has a line is not measured again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrumkv import common, decode_server, kernels, prefill_server
from spectrumkv.bench.methods.method import MethodName
from spectrumkv.bench.quality.scoring import WindowScore
from spectrumkv.common.errors import InvalidArgumentError

# A method on a window: index of the window, policy, codec, scorer, scope, target budget.
Key = tuple[int, str, str, str, str, float]
# What the services would send, and how predictions over it are compared, is in these packages.
MEASURED_PACKAGES = (common, kernels, prefill_server, decode_server)
ALLOWED = "a file that quality wrote with the same text, windows, model, versions and sources, or a new one"


class KeptScores:
    """Hold the scores that are known; those of a file stay there when the process ends.

    Attributes:
        path: the file; None to keep scores in memory only.
    """

    def __init__(self, path: Path | None = None, circumstances: Mapping[str, Any] | None = None) -> None:
        """Read the file, or begin it.

        Args:
            path: the file; None to keep scores in memory only.
            circumstances: what all scores of the file have in common, as JSON can express it.

        Raises:
            InvalidArgumentError: the file cannot be read or written, or has scores of other circumstances.
        """
        self.path = path
        self._scores: dict[Key, WindowScore] = {}
        if path is not None:
            try:
                self._open(path, dict(circumstances or {}))
            except OSError as error:
                raise InvalidArgumentError(f"--scores {path}: {error.strerror}; allowed: {ALLOWED}") from error

    def has(self, window: int, method: MethodName) -> bool:
        """Return whether the score of a method on a window is known."""
        return _key(window, method) in self._scores

    def get(self, window: int, method: MethodName) -> WindowScore:
        """Return the score of a method on a window, which is known."""
        return self._scores[_key(window, method)]

    def add(self, window: int, method: MethodName, score: WindowScore) -> None:
        """Add the score of a method on a window.

        Raises:
            InvalidArgumentError: the file cannot be written.
        """
        key = _key(window, method)
        self._scores[key] = score
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "score": dataclasses.asdict(score)}) + "\n")
            except OSError as error:
                raise InvalidArgumentError(f"--scores {self.path}: {error.strerror}") from error

    def _open(self, path: Path, circumstances: dict[str, Any]) -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            # The process ended while it wrote the last line.
            path.write_text(whole, encoding="utf-8")
        if not whole:
            path.write_text(json.dumps(circumstances) + "\n", encoding="utf-8")
            return
        first, *others = whole.splitlines()
        _check(path, first, circumstances)
        for number, line in enumerate(others, start=2):
            try:
                entry = json.loads(line)
                self._scores[tuple(entry["key"])] = WindowScore(**entry["score"])
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(f"--scores {path}, line {number}: {error}; allowed: {ALLOWED}") from error


def sources_digest() -> str:
    """Return the SHA-256 of the sources of `MEASURED_PACKAGES`, which tells apart two states of the code."""
    digest = hashlib.sha256()
    for package in MEASURED_PACKAGES:
        (folder,) = package.__path__
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _check(path: Path, line: str, circumstances: Mapping[str, Any]) -> None:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError(f"--scores {path}: {error}; allowed: {ALLOWED}") from error
    for name, value in circumstances.items():
        if not isinstance(found, dict) or found.get(name) != value:
            there = found.get(name) if isinstance(found, dict) else found
            raise InvalidArgumentError(
                f"--scores {path} has {name} {there!r}, and this is {value!r}; allowed: {ALLOWED}"
            )


def _key(window: int, method: MethodName) -> Key:
    return window, method.policy, method.codec, method.scorer, method.scope, method.budget
