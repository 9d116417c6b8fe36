"""Writes one log line at the end of every request, with the same request id on both services, and formats log lines.

A handler finds its request's record with `current_request`, and adds what it learns: numbers and names, never text of
a prompt or of an answer. The interceptor in `common.rpc` writes the record when the request is over, however it
ended. A record's fields reach the formatters as `extra={"fields": {…}}`.
"""

import json
import logging
import re
import time
import unicodedata
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError, SpectrumKVError, quoted
from spectrumkv.common.telemetry.tracing import RequestSpan, Stage, TraceContext

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARACTERS = 128

Value = str | int | float
Fields = Mapping[str, Value]

# The messages of these codes may quote what the caller sent, so they are not logged.
_QUOTES_THE_CALLER = frozenset({"INVALID_ARGUMENT", "NOT_FOUND"})
_OUR_FAULT = frozenset({"INTERNAL", "DATA_LOSS"})


def check_request_id(request_id: str) -> None:
    """Refuse a request id that a log should not hold.

    Raises:
        InvalidArgumentError: the id is longer than 128 characters, or one of them cannot be printed.
    """
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidArgumentError(
            f"request_id has {len(request_id)} characters; allowed: at most {MAX_REQUEST_ID_CHARACTERS}"
        )
    if any(unicodedata.category(character)[0] in "CZ" and character != " " for character in request_id):
        raise InvalidArgumentError(f"request_id is {quoted(request_id)}; allowed: characters that can be printed")


class RequestRecord:
    """Collects what the log line of one request will say.

    Args:
        service: "PrefillService" or "DecodeService".
        peer: the caller's address, as gRPC names it.
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
        """Add fields to the line, or replace them."""
        self._fields.update(fields)

    def add(self, **counts: int) -> None:
        """Add to the counts in fields of the line."""
        for name, count in counts.items():
            self._fields[name] = int(self._fields.get(name, 0)) + count

    def begin_stage(self, name: str, at: float | None = None) -> None:
        """Begin a stage of the request, and end the stage before it; each becomes a span.

        Args:
            name: the stage's name.
            at: seconds of the monotonic clock at which the stage began; now if not given.
        """
        self._stages.append((name, time.monotonic() if at is None else at))

    def at_end(self, fields: Callable[[], Fields]) -> None:
        """Add fields to the line that are known only when the request is over; `fields` is called then."""
        self._at_end.append(fields)

    def write(self, code: str, error: SpectrumKVError | None, span: RequestSpan | None = None) -> None:
        """Log the line, and end the request's span.

        Args:
            code: the name of the status code that the request ended with.
            error: the reason why the code is not OK.
            span: the request's span.
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
    """Return the record of the request that the calling handler serves.

    Outside of a server this is a new record, which is never written.
    """
    return _current.get() or RequestRecord("", "", TraceContext())


def set_current_request(record: RequestRecord) -> None:
    """Set what `current_request` returns to the handler that is about to run."""
    _current.set(record)


# Values that need no quotes, because no character in them ends a field or a line.
_PLAIN = re.compile(r"[A-Za-z0-9_.:,/@+\[\]-]+")


class TextFormatter(logging.Formatter):
    """Writes time, level, logger and message, then `key=value` for each field, quoted as in JSON where needed."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's spelling
        """Return the line without a traceback."""
        fields = (f"{key}={_as_text(value)}" for key, value in _fields(record).items())
        return " ".join((super().formatMessage(record), *fields))


class JsonFormatter(logging.Formatter):
    """Writes a JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the fields, `exception`.

    Why this is not python-json-logger or structlog: docs/adr/0114-json-logs.md.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: _rounded(value) for key, value in _fields(record).items()},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


FORMATTERS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _rounded(value: Any) -> Any:
    # Six digits are microseconds for times, and enough for ratios.
    return round(value, 6) if isinstance(value, float) else value


def _as_text(value: Any) -> str:
    text = f"{_rounded(value)}"
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
