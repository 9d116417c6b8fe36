"""JSON for scripts: protobuf messages as plain objects, written to a file or to standard output."""

import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from spectrumkv.common.errors import InvalidArgumentError

STDOUT = "-"


def message_as_json(message: Message) -> dict[str, Any]:
    """Return all fields by their proto names, defaults included.

    Unlike protobuf's own mapping, 64-bit integers stay numbers, bytes are hexadecimal, and an unset optional field is
    null.
    """
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def write_json(content: dict[str, Any], destination: str) -> None:
    """Write one object.

    Args:
        content: what json can carry.
        destination: a path, or "-" for standard output.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if destination == STDOUT:
        sys.stdout.write(text)
        return
    try:
        Path(destination).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            f"--json {destination}: {error.strerror}; name a file that can be written"
        ) from error


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(one, field) for one in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return message_as_json(value)
    return value.hex() if isinstance(value, bytes) else value
