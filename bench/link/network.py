"""Join two network namespaces by a shaped link for as long as a block runs; on Linux, as root.

This module changes only namespaces that it made itself. Their names have the process id, so two benches do not
collide. `ip netns list` lists what a killed bench leaves behind, and `ip netns delete NAME` deletes it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from spectrumkv.common.errors import FailedPreconditionError, InternalError

# These addresses are reserved for documentation (RFC 5737) and are not routed.
PREFILL_HOST = "192.0.2.1"
DECODE_HOST = "192.0.2.2"
PREFIX_BITS = 30
LINK = "link0"

# A token bucket needs room for what the kernel sends at once: several segments of 64 KiB, and at high rates the bytes
# between two ticks of its timer.
LEAST_BURST_BYTES = 256 << 10
BURST_SECONDS = 0.002
# Longest time that a packet may wait in the shaper; later packets are dropped, which slows the sender down.
QUEUE_LATENCY = "50ms"


@dataclass(frozen=True)
class Namespace:
    """Hold a network namespace that the bench made.

    Attributes:
        name: its name in `ip netns`.
    """

    name: str

    def command(self, *words: str) -> tuple[str, ...]:
        """Return the command that runs the program `words` inside; `ip` replaces its own process by the program."""
        return (_tool("ip"), "netns", "exec", self.name, *words)


@dataclass(frozen=True)
class ShapedLink:
    """Hold a prefill and a decode namespace, each with one end of a link.

    Attributes:
        prefill: the namespace of `PREFILL_HOST`.
        decode: the namespace of `DECODE_HOST`.
    """

    prefill: Namespace
    decode: Namespace

    def shape(self, bits_per_second: float) -> None:
        """Limit both directions to a rate, in bits per second.

        Raises:
            InternalError: the kernel refuses the token bucket filter.
        """
        burst = max(LEAST_BURST_BYTES, int(bits_per_second / 8 * BURST_SECONDS))
        for namespace in (self.prefill, self.decode):
            _run(
                *namespace.command(_tool("tc"), "qdisc", "replace", "dev", LINK, "root", "tbf"),
                *("rate", f"{bits_per_second:.0f}bit", "burst", str(burst), "latency", QUEUE_LATENCY),
            )


def check_privileges() -> None:
    """Check that namespaces can be made here.

    Raises:
        FailedPreconditionError: the system is not Linux, the user is not root, or `ip` or `tc` is missing.
    """
    if sys.platform != "linux":
        raise FailedPreconditionError(f"the link bench needs Linux's network namespaces; this is {sys.platform}")
    if os.geteuid() != 0:
        raise FailedPreconditionError("the link bench makes network namespaces, which takes root; run it with sudo")
    for name in ("ip", "tc"):
        _tool(name)


@contextmanager
def shaped_link() -> Iterator[ShapedLink]:
    """Make both namespaces and the link, which is not shaped yet; delete them at the end, also after an error.

    Yields:
        The link.

    Raises:
        FailedPreconditionError: see `check_privileges`.
        InternalError: the kernel refuses a namespace or the link.
    """
    check_privileges()
    with ExitStack() as made:
        prefill = made.enter_context(_namespace(f"spectrumkv-prefill-{os.getpid()}"))
        decode = made.enter_context(_namespace(f"spectrumkv-decode-{os.getpid()}"))
        # Both ends are created inside, so that the machine's own namespace never has them.
        _run(
            *(_tool("ip"), "link", "add", LINK, "netns", prefill.name),
            *("type", "veth", "peer", "name", LINK, "netns", decode.name),
        )
        for namespace, host in ((prefill, PREFILL_HOST), (decode, DECODE_HOST)):
            for words in (
                ("address", "add", f"{host}/{PREFIX_BITS}", "dev", LINK),
                ("link", "set", LINK, "up"),
                ("link", "set", "lo", "up"),
            ):
                _run(_tool("ip"), "-netns", namespace.name, *words)
        yield ShapedLink(prefill, decode)


@contextmanager
def _namespace(name: str) -> Iterator[Namespace]:
    _run(_tool("ip"), "netns", "add", name)
    try:
        yield Namespace(name)
    finally:
        # Deleting a namespace deletes its end of the link.
        _run(_tool("ip"), "netns", "delete", name)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise FailedPreconditionError(f"the link bench needs {name!r}; install the package iproute2")
    return path


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own words
    if done.returncode:
        raise InternalError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
