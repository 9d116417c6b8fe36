"""Two network namespaces joined by one shaped link; made for as long as a block runs, Linux and root only.

Everything in here touches only namespaces of its own making. Their names hold the process id, so two benches do not
meet; what a killed bench leaves behind is listed by `ip netns list` and goes with `ip netns delete NAME`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from spectrumkv.common.errors import FailedPreconditionError, InternalError

# Addresses that are reserved for documentation (RFC 5737) and routed nowhere.
PREFILL_HOST = "192.0.2.1"
DECODE_HOST = "192.0.2.2"
PREFIX_BITS = 30
LINK = "link0"

# A token bucket needs room for what the kernel hands over at once: a segment of 64 KiB several times over, and at
# high rates what passes between two turns of its timer.
LEAST_BURST_BYTES = 256 << 10
BURST_SECONDS = 0.002
# Longest time that a packet waits in the shaper before the sender is told to slow down.
QUEUE_LATENCY = "50ms"


@dataclass(frozen=True)
class Namespace:
    """A network namespace of our own.

    Attributes:
        name: as `ip netns` knows it.
    """

    name: str

    def command(self, *words: str) -> tuple[str, ...]:
        """Return the command that runs `words` inside; the process that starts it becomes the program."""
        return (_tool("ip"), "netns", "exec", self.name, *words)


@dataclass(frozen=True)
class ShapedLink:
    """A prefill and a decode namespace, each with one end of a link.

    Attributes:
        prefill: has `PREFILL_HOST`.
        decode: has `DECODE_HOST`.
    """

    prefill: Namespace
    decode: Namespace

    def shape(self, bits_per_second: float) -> None:
        """Limit both directions to a rate from now on.

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
    """Refuse to start where namespaces cannot be made.

    Raises:
        FailedPreconditionError: this is not Linux, not root, or `ip` and `tc` are missing.
    """
    if sys.platform != "linux":
        raise FailedPreconditionError(f"the link bench needs Linux's network namespaces; this is {sys.platform}")
    if os.geteuid() != 0:
        raise FailedPreconditionError("the link bench makes network namespaces, which takes root; run it with sudo")
    for name in ("ip", "tc"):
        _tool(name)


@contextmanager
def shaped_link() -> Iterator[ShapedLink]:
    """Make both namespaces and the link, unshaped at first; delete them at the end, whatever happened.

    Raises:
        FailedPreconditionError: see `check_privileges`.
        InternalError: the kernel refuses one of them.
    """
    check_privileges()
    with ExitStack() as made:
        prefill = made.enter_context(_namespace(f"spectrumkv-prefill-{os.getpid()}"))
        decode = made.enter_context(_namespace(f"spectrumkv-decode-{os.getpid()}"))
        # Both ends are born inside, so that nothing ever shows in the machine's own namespace.
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
        # The link's ends go with their namespaces.
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
