"""Follows a name of `--decode`: looks its addresses up again and again, since pods come and go.

Why this is not gRPC's own resolver: docs/adr/0170-a-worker-for-each-address-of-a-name.md.
"""

import logging
import socket
import threading
from collections.abc import Callable

from spectrumkv.common.service.config import Address

logger = logging.getLogger(__name__)

Resolve = Callable[[Address], frozenset[Address]]


def resolve(name: Address) -> frozenset[Address]:
    """Look up a name's addresses, as every other program on this machine finds them (/etc/hosts, DNS).

    Args:
        name: a host's name, and the port of each address.

    Returns:
        The addresses, all IPv4, or all IPv6 where there is no IPv4 one: a pod that has both is one worker.

    Raises:
        OSError: the name has no address, or no name server answers.
    """
    found = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    hosts = {
        family: {str(one[4][0]) for one in found if one[0] == family} for family in (socket.AF_INET, socket.AF_INET6)
    }
    if hosts[socket.AF_INET]:
        return frozenset(Address(host, name.port) for host in hosts[socket.AF_INET])
    return frozenset(Address(f"[{host}]", name.port) for host in hosts[socket.AF_INET6])


def described_target(target: Address) -> str:
    """Return an address or a name of `--decode`, a name with the addresses that it has now.

    Args:
        target: the address or name.
    """
    if target.ip_version is not None:
        return str(target)
    try:
        return f"{target}, now {', '.join(sorted(map(str, resolve(target))))}"
    except (OSError, UnicodeError) as error:
        return f"{target}, which does not resolve now: {_reason(error)}"


class FollowedName:
    """Looks up one name again and again, on a thread of its own: a look-up may hang for as long as name servers do.

    Args:
        name: a host's name and a port.
        seconds: from the end of a look-up to the next one.
        on_answer: called, on the thread, with the addresses after each look-up that found some.
        look_up: finds the addresses.

    Attributes:
        name: a host's name and a port.
        failure: why the latest look-up found nothing; None where it found addresses, or none has ended yet.
    """

    def __init__(
        self,
        name: Address,
        seconds: float,
        on_answer: Callable[["FollowedName", frozenset[Address]], None],
        look_up: Resolve = resolve,
    ) -> None:
        self.name = name
        self.failure: str | None = None
        self._seconds = seconds
        self._on_answer = on_answer
        self._look_up = look_up
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"dns-{name.host}", daemon=True)

    def start(self) -> None:
        """Begin to look up."""
        self._thread.start()

    def close(self) -> None:
        """End after the look-up that is under way; this does not wait for it."""
        self._closed.set()

    def _follow(self) -> None:
        while not self._closed.is_set():
            found = self._found()
            if found and not self._closed.is_set():
                self._on_answer(self, found)
            self._closed.wait(self._seconds)

    def _found(self) -> frozenset[Address]:
        """Return the addresses; none where the look-up failed, which is logged when it begins."""
        try:
            found = self._look_up(self.name)
        except (OSError, UnicodeError) as error:
            reason = _reason(error)
            if self.failure is None:
                logger.warning(
                    "%s of --decode does not resolve: %s; workers that were found before stay", self.name.host, reason
                )
            self.failure = reason
            return frozenset()
        if self.failure is not None:
            logger.info("%s of --decode resolves again", self.name.host)
        self.failure = None
        return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
