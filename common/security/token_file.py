"""Reads a file of bearer tokens: one a line, with a name for whoever sends it, `NAME:TOKEN`.

No error and no representation of what is read shows a token, or a name that may be one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security.callers import ANONYMOUS
from spectrumkv.common.security.watched_files import read_file

MIN_TOKEN_CHARACTERS, MAX_TOKEN_CHARACTERS = 16, 512
MAX_TOKENS = 1024
# Shorter than the tokens that `TOKEN_RULE` advises: logs show names, and must not show such a token in one's place.
MAX_NAME_CHARACTERS = 32

TOKEN_RULE = (
    f"{MIN_TOKEN_CHARACTERS} to {MAX_TOKEN_CHARACTERS} characters of A-Z a-z 0-9 . _ ~ + / - with = at the end only "
    "(make one with: openssl rand -hex 32)"
)
_NAME_RULE = f"1 to {MAX_NAME_CHARACTERS} characters of A-Z a-z 0-9 . _ @ -, other than {ANONYMOUS}"
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_NAME = re.compile(rf"[A-Za-z0-9._@-]{{1,{MAX_NAME_CHARACTERS}}}")


@dataclass(frozen=True)
class NamedToken:
    """A token, and the name by which logs call whoever sends it.

    Attributes:
        name: from the file; `line-3` where line 3 gives none.
        token: never shown.
    """

    name: str
    token: str = field(repr=False)


def read_tokens(option: str, path: Path) -> tuple[NamedToken, ...]:
    """Return a file's tokens; blank lines and lines that start with # do not count.

    Args:
        option: the flag that named the file, for errors, which never show the file's contents.
        path: the file.

    Raises:
        InvalidArgumentError: the file cannot be read, holds no token or too many, a line is not a token or has a bad
            name, or two lines have the same name or token.
    """
    lines = read_file(option, path).decode("utf-8", "replace").splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    given = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not 0 < len(given) <= MAX_TOKENS:
        raise InvalidArgumentError(f"{option} {path} has {len(given)} tokens; allowed: 1 to {MAX_TOKENS}, one a line")
    tokens = {number: _parse(number, line) for number, line in given}
    for reason in (*_wrong(tokens), *_repeated(tokens)):
        raise InvalidArgumentError(f"{option} {path}: {reason}")
    return tuple(tokens.values())


def is_token(text: str) -> bool:
    """Return whether a text can be a token."""
    return MIN_TOKEN_CHARACTERS <= len(text) <= MAX_TOKEN_CHARACTERS and _TOKEN.fullmatch(text) is not None


def _parse(number: int, line: str) -> NamedToken:
    name, colon, token = line.partition(":")
    return NamedToken(name, token) if colon else NamedToken(f"line-{number}", line)


def _wrong(tokens: dict[int, NamedToken]) -> Iterator[str]:
    """Yield what is wrong with each line by itself."""
    for number, one in tokens.items():
        if not _NAME.fullmatch(one.name) or one.name == ANONYMOUS:
            yield f"line {number} has a name that is not allowed; allowed: {_NAME_RULE}, then a colon and the token"
        if not is_token(one.token):
            yield f"line {number} is not a token; allowed: {TOKEN_RULE}, after a name and a colon where it has a name"


def _repeated(tokens: dict[int, NamedToken]) -> Iterator[str]:
    """Yield each line that repeats what an earlier one has."""
    first: dict[str, int] = {}
    for number, one in tokens.items():
        for kind, value in (("name", one.name), ("token", one.token)):
            earlier = first.setdefault(f"{kind} {value}", number)
            if earlier != number:
                yield f"line {number} has the {kind} of line {earlier}; give each line a {kind} of its own"
