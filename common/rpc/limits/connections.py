"""Bounds the connections of each address; gRPC bounds them only in all, and tells nobody of one without a call.

A thread looks at the process's sockets and shuts down those that an address has beyond its share, the newest first.
gRPC then sees that the peer has gone. Between two looks one address may have more, up to the bound of all.
"""

import ipaddress
import logging
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger(__name__)

# How long the thread waits before it looks again: for less where it has just closed connections.
LOOK_SECONDS, LOOK_AGAIN_SECONDS = 1.0, 0.05
# Least time between two lines of the log.
TELL_SECONDS = 60.0
# The directory of this process's open files, on Linux and on macOS.
OPEN_FILES = "/dev/fd"
# Whoever has one address of an IPv6 network of this length has all of them.
IPV6_PREFIX_BITS = 64


class ConnectionLimit:
    """Closes the connections that an address has beyond a limit.

    Args:
        port: on which the server listens.
        limit: how many connections an address may have; an IPv6 address counts as its network of 64 bits.
        count_closed: called for each connection that is closed.
    """

    def __init__(self, port: int, limit: int, count_closed: Callable[[], None] = lambda: None) -> None:
        self._port = port
        self._limit = limit
        self._count_closed = count_closed
        # The address of each socket by its inode, in the order in which they were first seen; None for those that are
        # no connections to the server.
        self._known: dict[int, str | None] = {}
        self._told_at = -TELL_SECONDS
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="connections", daemon=True)

    def start(self) -> None:
        """Look at connections from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def enforce(self) -> int:
        """Close what is beyond the limit now.

        Returns:
            How many connections were closed.
        """
        open_now = {inode: descriptor for descriptor, inode in _sockets()}
        known = {inode: address for inode, address in self._known.items() if inode in open_now}
        new = {inode: descriptor for inode, descriptor in open_now.items() if inode not in known}
        known |= {inode: self._caller(descriptor) for inode, descriptor in new.items()}
        self._known = known
        counted: Counter[str] = Counter()
        closed: Counter[str] = Counter()
        for inode, address in known.items():
            if address is None:
                continue
            counted[address] += 1
            if counted[address] > self._limit and _inode(open_now[inode]) == inode:
                closed[address] += _shut_down(open_now[inode])
                # gRPC may take a moment to close it.
                known[inode] = None
        for _ in range(closed.total()):
            self._count_closed()
        self._tell(closed)
        return closed.total()

    def _watch(self) -> None:
        pause = LOOK_SECONDS
        while not self._stopped.wait(pause):
            pause = LOOK_AGAIN_SECONDS if self.enforce() else LOOK_SECONDS

    def _caller(self, descriptor: int) -> str | None:
        """Return the address that a socket's peer is counted under; None where it is no connection to the server."""
        try:
            opened = socket.socket(fileno=descriptor)
        except OSError:
            # It was closed meanwhile.
            return None
        try:
            here, peer = opened.getsockname(), opened.getpeername()
        except OSError:
            # It listens, or its peer has gone.
            return None
        finally:
            # The descriptor stays gRPC's.
            opened.detach()
        ours = isinstance(here, tuple) and here[1] == self._port
        return _counted_under(peer[0]) if ours else None

    def _tell(self, closed: "Counter[str]") -> None:
        now = time.monotonic()
        if closed and now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            (address, count), *_ = closed.most_common(1)
            logger.warning(
                "closed %d connections of %s, which has more than %d (--max-connections-per-address)",
                count,
                address,
                self._limit,
            )


def _sockets() -> list[tuple[int, int]]:
    """Return the descriptor and the inode of each socket of this process."""
    try:
        names = os.listdir(OPEN_FILES)
    except OSError:
        # The process has no descriptor left for the directory: other files have them, since connections have half.
        return []
    found = ((int(name), _inode(int(name))) for name in names)
    return [(descriptor, inode) for descriptor, inode in found if inode is not None]


def _inode(descriptor: int) -> int | None:
    """Return a socket's inode; None where the descriptor is closed, or no socket's."""
    try:
        facts = os.fstat(descriptor)
    except OSError:
        return None
    return facts.st_ino if stat.S_ISSOCK(facts.st_mode) else None


def _shut_down(descriptor: int) -> bool:
    """Return whether a connection was open, and end it; gRPC then closes its descriptor."""
    try:
        opened = socket.socket(fileno=descriptor)
    except OSError:
        return False
    try:
        opened.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    else:
        return True
    finally:
        opened.detach()


def _counted_under(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_PREFIX_BITS), strict=False))
