"""W3C Trace Context (www.w3.org/TR/trace-context): passed on as it came, so that others can join the traces."""

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# What the recommendation asks everybody to pass on; more is left out.
MAX_TRACESTATE_CHARACTERS = 512

# Version, trace id, parent id and flags; versions after 00 may have more.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,64})?"
)


@dataclass(frozen=True)
class TraceContext:
    """Which trace a request belongs to.

    Attributes:
        traceparent: version, trace id, parent id and flags; "" where the request is part of no trace.
        tracestate: what tracing systems add, or "".

    Raises:
        InvalidArgumentError: `traceparent` is none.
    """

    traceparent: str = ""
    tracestate: str = ""

    def __post_init__(self) -> None:
        if self.traceparent and not _is_traceparent(self.traceparent):
            raise InvalidArgumentError(
                f"traceparent is {self.traceparent!r}; allowed: 00-TRACEID-PARENTID-FLAGS, of 32, 16 and 2 "
                "hexadecimal digits in lower case"
            )

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, or ""."""
        return self.traceparent.split("-")[1] if self.traceparent else ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call."""
        pairs = ((TRACEPARENT, self.traceparent), (TRACESTATE, self.tracestate))
        return tuple((key, value) for key, value in pairs if value)

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]]) -> "TraceContext":
        """Read what came with a call; what the recommendation does not allow counts as absent."""
        found: dict[str, list[str]] = {TRACEPARENT: [], TRACESTATE: []}
        for key, value in metadata:
            if key in found and isinstance(value, str):
                found[key].append(value)
        parents, state = found[TRACEPARENT], ",".join(found[TRACESTATE])
        if len(parents) != 1 or not _is_traceparent(parents[0]):
            return cls()
        return cls(parents[0], state if len(state) <= MAX_TRACESTATE_CHARACTERS else "")


def _is_traceparent(text: str) -> bool:
    match = _TRACEPARENT.fullmatch(text)
    return match is not None and not (match[1] == "00" and match[3])


# gRPC runs each handler in a context of its own.
_current: ContextVar[TraceContext] = ContextVar("trace_context", default=TraceContext())  # noqa: B039  # frozen


def current_trace() -> TraceContext:
    """Return the trace of the request that this handler serves."""
    return _current.get()


def set_current_trace(trace: TraceContext) -> None:
    """Make `trace` that of the request which is about to be served."""
    _current.set(trace)
