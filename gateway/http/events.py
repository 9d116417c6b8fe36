"""Write server-sent events."""

import json
from typing import Any

EVENT_STREAM = b"text/event-stream"
# The last event of a stream.
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """Return an event that carries an object."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
