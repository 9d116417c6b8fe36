"""Named choices: policies, scorers and codecs register themselves; requests pick them by name."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from spectrumkv.common.errors import InvalidArgumentError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to choices of one kind.

    Args:
        kind: what the choices are, as users say it ("policy"); it appears in errors.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._choices: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument as `name`.

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
        """Return the choice called `name`.

        Raises:
            InvalidArgumentError: there is none; the message lists the valid names.
        """
        try:
            return self._choices[name]
        except KeyError:
            valid = ", ".join(self._choices)
            raise InvalidArgumentError(f"unknown {self.kind} {name!r}; valid: {valid}") from None

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._choices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)
