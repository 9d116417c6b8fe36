"""How log lines look: as text for people, as JSON for machines. Fields come with `extra={"fields": {…}}`."""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

# Values that need no quotes: nothing in them ends a field or a line.
_PLAIN = re.compile(r"[A-Za-z0-9_.:,/@+\[\]-]+")


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then `key=value` for each field, quoted as in JSON where needed."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's spelling
        """Return the line without a traceback."""
        fields = (f"{key}={_as_text(value)}" for key, value in _fields(record).items())
        return " ".join((super().formatMessage(record), *fields))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the fields, `exception`."""

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
    # Microseconds, and as fine for ratios.
    return round(value, 6) if isinstance(value, float) else value


def _as_text(value: Any) -> str:
    text = f"{_rounded(value)}"
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
