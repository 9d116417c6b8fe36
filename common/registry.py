"""Named choices: policies, scorers and codecs register themselves; requests pick them by name."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from spectrumkv.common.errors import InvalidArgumentError, quoted

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to choices of one kind.

    Args:
        kind: what the choices are, as users say it ("policy"); it appears in errors.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._choices: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under a name.

        Args:
            name: as requests give it.

        Returns:
            The decorator; what it decorates stays as it is.

        Raises:
            ValueError: the name is taken.
        """

        def add(choice: T) -> T:
            if name in self._choices:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._choices[name] = choice
            return choice

        return add

    def get(self, name: str) -> T:
        """Look a choice up.

        Args:
            name: as a request gives it.

        Returns:
            The choice.

        Raises:
            InvalidArgumentError: there is none; the message lists the valid names.
        """
        try:
            return self._choices[name]
        except KeyError:
            valid = ", ".join(self._choices)
            raise InvalidArgumentError(f"unknown {self.kind} {quoted(name)}; allowed: {valid}") from None

    def names(self) -> tuple[str, ...]:
        """Return all names, in the order of registration."""
        return tuple(self._choices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)


def import_modules(package: str, folders: Iterable[str]) -> None:
    """Import every module of a package, so that what they register is there.

    A package whose `__init__` calls this needs no list of its modules: to add a choice is to add a file.

    Args:
        package: the package's name.
        folders: its `__path__`.
    """
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"{package}.{module.name}")
