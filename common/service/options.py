"""How an option is declared, and how the text of its value is read."""

import ipaddress
import math
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Parser = Callable[[str], Any]

# Longest time that an option may name: beyond it a typing error is likelier than intent.
WEEK_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Address:
    """Where a server listens or is found. An IPv6 host stands in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def ip_version(self) -> int | None:
        """4 or 6 where the host is numeric; None where it is a name."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).version
        except ValueError:
            return None

    def listener(self) -> socket.socket:
        """Return a socket that listens here, as servers do.

        Raises:
            OSError: the address is not this machine's, or in use.
        """
        listener = socket.socket(socket.AF_INET6 if self.host.startswith("[") else socket.AF_INET)
        try:
            # A port whose last connections are still in TIME_WAIT counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host.strip("[]"), self.port))
            listener.listen()
        except OSError:
            listener.close()
            raise
        return listener

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read "host:port", where host is a name, an IPv4 address or a bracketed IPv6 address, and port 0 any.

        Raises:
            ValueError: it is something else; the message says what is allowed.
        """
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", text)
        if not match or int(match[2]) > 65535 or (text.startswith("[") and not _is_ipv6(match[1])):
            raise ValueError("HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051, with a port from 0 to 65535")
        return cls(match[1], int(match[2]))


def _is_ipv6(bracketed: str) -> bool:
    try:
        ipaddress.IPv6Address(bracketed.strip("[]"))
    except ValueError:
        return False
    return True


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Read "host:port,host:port,…"."""
    return tuple(Address.parse(part.strip()) for part in text.split(","))


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as "512MiB", "4GiB" or "1000000"."""
    match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,18})?)\s*([KMGT]i?)?B?", text.strip())
    unit = (match[2] if match else None) or ""
    base = 1024 if unit.endswith("i") else 1000
    count = int(Fraction(match[1]) * base ** " KMGT".index(unit[:1] or " ")) if match else 0
    if not 0 < count < 1 << 63:
        raise ValueError("a positive number of bytes such as 512MiB or 4GiB")
    return count


def number(minimum: float, maximum: float = math.inf, kind: type = float) -> Parser:
    """Return a parser of finite numbers from `minimum` to `maximum`."""
    bounds = f"at least {minimum:g}" if maximum == math.inf else f"from {minimum:g} to {maximum:g}"
    allowed = f"a {'whole ' if kind is int else ''}number {bounds}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not minimum <= value <= maximum or not math.isfinite(value):
            raise ValueError(allowed)
        return value

    return parse


def or_auto(parse: Parser) -> Parser:
    """Return a parser that also accepts "auto", which is None: the service finds the value."""

    def parse_unless_auto(text: str) -> Any:
        if text == "auto":
            return None
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    return parse_unless_auto


def one_of(*choices: str) -> Parser:
    """Return a parser that accepts these words only."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


def some_text(text: str) -> str:
    """Accept any text but none: an empty name stands for nothing, and as a path for the folder that one is in."""
    if not text:
        raise ValueError("a text that is not empty, or leave the option out")
    return text


def option(default: Any, help_text: str, parse: Parser = some_text, shown: str = "") -> Any:
    """Declare one option: its default, what it means, and how its text is read.

    Args:
        default: where none is given.
        help_text: what it means.
        parse: raises ValueError with a description of what is allowed.
        shown: the default as people write it, where that is another text.
    """
    return field(default=default, metadata={"help": help_text, "parse": parse, "shown": shown})


def allowed_by(parse: Parser) -> str:
    """What a parser allows, in the words in which it refuses everything else; empty where it takes any text."""
    try:
        parse("\0")
    except ValueError as error:
        return str(error)
    return ""
