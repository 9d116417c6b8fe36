"""Keep the outcomes of a bench in a file while it measures, so that a run that was cut goes on where it ended.

A first line says what was measured, and every other line is one outcome. What has a line is not measured again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from spectrumkv.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Outcome = TypeVar("Outcome", bound="DataclassInstance")
# What names an outcome in its file, as JSON can express it.
Key = tuple[int | str | float, ...]


class KeptOutcomes(Generic[Outcome]):
    """Hold the outcomes that are known; those of a file stay there when the process ends.

    Attributes:
        path: the file; None to keep outcomes in memory only.
    """

    def __init__(
        self, kind: type[Outcome], allowed: str, path: Path | None, circumstances: Mapping[str, Any] | None = None
    ) -> None:
        """Read the file, or begin it.

        Args:
            kind: a dataclass whose fields JSON can express.
            allowed: which files may be named, for messages.
            path: the file; None to keep outcomes in memory only.
            circumstances: what all outcomes of the file have in common, as JSON can express it.

        Raises:
            InvalidArgumentError: the file cannot be read or written, or has outcomes of other circumstances.
        """
        self.path = path
        self._kind, self._allowed = kind, allowed
        self._outcomes: dict[Key, Outcome] = {}
        if path is not None:
            try:
                self._open(path, dict(circumstances or {}))
            except OSError as error:
                raise InvalidArgumentError(f"--scores {path}: {error.strerror}; allowed: {allowed}") from error

    def __contains__(self, key: Key) -> bool:
        """Return whether an outcome is known."""
        return key in self._outcomes

    def __getitem__(self, key: Key) -> Outcome:
        """Return an outcome that is known."""
        return self._outcomes[key]

    def keep(self, key: Key, outcome: Outcome) -> None:
        """Add an outcome.

        Args:
            key: names it.
            outcome: what was measured.

        Raises:
            InvalidArgumentError: the file cannot be written.
        """
        self._outcomes[key] = outcome
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "score": dataclasses.asdict(outcome)}) + "\n")
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
        self._check(path, first, circumstances)
        for number, line in enumerate(others, start=2):
            try:
                entry = json.loads(line)
                self._outcomes[tuple(entry["key"])] = self._kind(**entry["score"])
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(
                    f"--scores {path}, line {number}: {error}; allowed: {self._allowed}"
                ) from error

    def _check(self, path: Path, line: str, circumstances: Mapping[str, Any]) -> None:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise InvalidArgumentError(f"--scores {path}: {error}; allowed: {self._allowed}") from error
        for name, value in circumstances.items():
            if not isinstance(found, dict) or found.get(name) != value:
                there = found.get(name) if isinstance(found, dict) else found
                raise InvalidArgumentError(
                    f"--scores {path} has {name} {there!r}, and this is {value!r}; allowed: {self._allowed}"
                )


def modules_digest(modules: Iterable[ModuleType]) -> str:
    """Return the SHA-256 of the modules' sources, in hexadecimal, which tells apart two states of the code.

    Args:
        modules: single ones, and packages with all that is below them.
    """
    digest = hashlib.sha256()
    for module in modules:
        source = Path(str(module.__file__))
        for path in sorted(source.parent.rglob("*.py")) if hasattr(module, "__path__") else [source]:
            digest.update(path.read_bytes())
    return digest.hexdigest()
