"""Declares options, and reads their values from text."""

import ipaddress
import math
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError

Parser = Callable[[str], Any]

# The longest time that an option may name: a longer one is more likely a typing error than intended.
WEEK_SECONDS = 7 * 86400.0


# Names of loopback that systems have beside localhost.
LOOPBACK_NAMES = ("localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")


@dataclass(frozen=True)
class Address:
    """The address that a server listens on; an IPv6 host is in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def leads_here(self) -> bool:
        """Whether a connection to the address stays on this machine, in whichever way that is written.

        What `is_loopback` accepts others cannot reach; of these, too, a listener on every address is one.
        """
        try:
            ip = ipaddress.ip_address(self.host.strip("[]").partition("%")[0])
        except ValueError:
            name = self.host.lower().rstrip(".")
            return name == "localhost" or name.endswith(".localhost") or name in LOOPBACK_NAMES
        mapped = getattr(ip, "ipv4_mapped", None)
        return any(one.is_loopback or one.is_unspecified for one in (ip, mapped) if one is not None)

    @property
    def ip_version(self) -> int | None:
        """4 or 6 if the host is numeric; None if it is a name."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).version
        except ValueError:
            return None

    @property
    def from_here(self) -> "Address":
        """The address by which this machine reaches what listens here: loopback's where that is every address."""
        every = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # it is compared, not listened on
        return Address(every.get(self.host, self.host), self.port)

    def listener(self) -> socket.socket:
        """Return a socket that listens on this address, as servers do.

        Raises:
            OSError: the address is not this machine's, or is in use; or the name has no address.
        """
        found = socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have addresses of both kinds, or of IPv6 only.
        family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        # asyncio switches Nagle's algorithm off only where a socket names its protocol. With it an event that follows
        # another waits for the reader's acknowledgement, up to 40 ms on Linux.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            # A port whose last connections are still in TIME_WAIT counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
        return listener

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read an address from text.

        Args:
            text: "host:port"; the host is a name, an IPv4 address or an IPv6 address in brackets, and port 0 stands
                for any free port.

        Returns:
            The address.

        Raises:
            ValueError: the text is not an address; the message says what is allowed.
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
    """Return the addresses in "host:port,host:port,…".

    Raises:
        ValueError: one of them is not an address; the message says what is allowed.
    """
    return tuple(Address.parse(part.strip()) for part in text.split(","))


def parse_bytes(text: str) -> int:
    """Return a number of bytes, such as that of "512MiB", "4GiB" or "1000000".

    Raises:
        ValueError: the text is not a number of bytes; the message says what is allowed.
    """
    match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,18})?)\s*([KMGT]i?)?B?", text.strip())
    unit = (match[2] if match else None) or ""
    base = 1024 if unit.endswith("i") else 1000
    count = int(Fraction(match[1]) * base ** " KMGT".index(unit[:1] or " ")) if match else 0
    if not 0 < count < 1 << 63:
        raise ValueError("a positive number of bytes such as 512MiB or 4GiB")
    return count


def check_certificate_and_key(cert: object | None, key: object | None, options: str = "tls") -> None:
    """Refuse a certificate without its key and a key without its certificate.

    Args:
        cert: the certificate.
        key: its key.
        options: what the names of their options begin with.

    Raises:
        InvalidArgumentError: one of them is None and the other is not.
    """
    if (cert is None) != (key is None):
        flags = [flag_name(f"{options}_{kind}") for kind in ("cert", "key")]
        given, missing = flags if key is None else reversed(flags)
        raise InvalidArgumentError(f"{given} is given without {missing}; a certificate and its key go together")


def number(minimum: float, maximum: float = math.inf, kind: type = float) -> Parser:
    """Return a parser of finite numbers.

    Args:
        minimum: the least number that is allowed.
        maximum: the largest number that is allowed.
        kind: float or int.
    """
    # A float in its short form is rounded to six digits.
    least, most = (str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (minimum, maximum))
    bounds = f"at least {least}" if maximum == math.inf else f"from {least} to {most}"
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
    """Return a parser that also accepts "auto", which it reads as None: the service then finds the value."""
    return _or_word("auto", parse)


def or_never(parse: Parser) -> Parser:
    """Return a parser of times that also accepts "never", which it reads as None."""
    return _or_word("never", parse)


def _or_word(word: str, parse: Parser) -> Parser:
    def parse_unless_word(text: str) -> Any:
        if text == word:
            return None
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, or {word}") from None

    return parse_unless_word


def one_of(*choices: str) -> Parser:
    """Return a parser that accepts only these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


def some_text(text: str) -> str:
    """Return the text unless it is empty: an empty path would stand for the current directory.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("a text that is not empty, or leave the option out")
    return text


def option(default: Any, help_text: str, parse: Parser = some_text, shown: str = "") -> Any:
    """Declare one option.

    Args:
        default: the value if the option is not given.
        help_text: what the option means.
        parse: reads the value from text; raises ValueError with a description of what is allowed.
        shown: the default as people write it, if that differs from its text.

    Returns:
        The dataclass field.
    """
    return field(default=default, metadata={"help": help_text, "parse": parse, "shown": shown})


def allowed_by(parse: Parser) -> str:
    """Return what a parser allows, in the words of its error; "" if it accepts any text."""
    try:
        parse("\0")
    except ValueError as error:
        return str(error)
    return ""


def flag_name(option_name: str) -> str:
    """Return the flag of an option: "kv_memory" becomes "--kv-memory"."""
    return "--" + option_name.replace("_", "-")


def text_of(value: Any) -> str:
    """Return an option's value as the text of its flag."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
