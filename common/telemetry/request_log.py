"""One log line for the end of every request, with the same request id on both services.

A handler finds its line with `current_request`, and adds what it learns: numbers and names, never text of a prompt or
of an answer. `rpc_interceptor` writes the line when the request is over, however that came.
"""

import logging
import time
import unicodedata
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError
from spectrumkv.common.telemetry.spans import RequestSpan, Stage
from spectrumkv.common.telemetry.trace_context import TraceContext

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARACTERS = 128

Value = str | int | float
Fields = Mapping[str, Value]

# What callers did wrong is theirs to know; such messages may quote what they sent.
_QUOTES_THE_CALLER = frozenset({"INVALID_ARGUMENT", "NOT_FOUND"})
_OUR_FAULT = frozenset({"INTERNAL", "DATA_LOSS"})


def check_request_id(request_id: str) -> None:
    """Refuse an id that a log should not hold.

    Raises:
        InvalidArgumentError: it is longer than 128 characters, or one of them cannot be printed.
    """
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidArgumentError(
            f"request_id has {len(request_id)} characters; allowed: at most {MAX_REQUEST_ID_CHARACTERS}"
        )
    if any(unicodedata.category(character)[0] in "CZ" and character != " " for character in request_id):
        raise InvalidArgumentError(f"request_id is {request_id!r}; allowed: characters that can be printed")


class RequestRecord:
    """What the line of one request will say.

    Args:
        service: "PrefillService" or "DecodeService".
        peer: where the caller is, as gRPC names it.
        trace: the trace that the request belongs to.
    """

    def __init__(self, service: str, peer: str, trace: TraceContext) -> None:
        self._started_at = time.monotonic()
        self._stages: list[Stage] = []
        self._fields: dict[str, Value] = {"service": service, "request_id": "", "peer": peer}
        if trace.trace_id:
            self._fields["trace_id"] = trace.trace_id
        self._at_end: list[Callable[[], Fields]] = []

    def note(self, **fields: Value) -> None:
        """Add fields, or replace them."""
        self._fields.update(fields)

    def add(self, **counts: int) -> None:
        """Add to fields that count."""
        for name, count in counts.items():
            self._fields[name] = int(self._fields.get(name, 0)) + count

    def begin_stage(self, name: str, at: float | None = None) -> None:
        """Say that a stage begins, and the one before it is over; spans show it.

        Args:
            name: of the stage.
            at: when it began, by the monotonic clock; now if not given.
        """
        self._stages.append((name, time.monotonic() if at is None else at))

    def at_end(self, fields: Callable[[], Fields]) -> None:
        """Add what `fields` returns when the request is over."""
        self._at_end.append(fields)

    def write(self, code: str, error: SpectrumKVError | None, span: RequestSpan | None = None) -> None:
        """Log the line, and end the request's span.

        Args:
            code: name of the status code that the request ended with.
            error: why it was not OK.
            span: of the request.
        """
        fields = {**self._fields, "code": code, "seconds": time.monotonic() - self._started_at}
        for more in self._at_end:
            fields.update(more())
        if error is not None and code not in _QUOTES_THE_CALLER:
            fields["error"] = error.message
        level = logging.WARNING if code in _OUR_FAULT else logging.INFO
        logger.log(level, "request ended", extra={"fields": fields})
        if span is not None:
            span.end(code, fields, self._stages)


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def current_request() -> RequestRecord:
    """Return the record of the request that this handler serves; outside of a server, one that nobody writes."""
    return _current.get() or RequestRecord("", "", TraceContext())


def set_current_request(record: RequestRecord) -> None:
    """Make `record` that of the request which is about to be served."""
    _current.set(record)
