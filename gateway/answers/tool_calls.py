"""Find the tool calls in answers, and write them as the OpenAI API has them."""

from collections.abc import Sequence
from typing import Any

from spectrumkv.common.tool_calls import CallDelta, ContentDelta, Delta, ToolCallFormat, ToolCallParser


class ToolCallWriter:
    """Separate the answers to one request into text and calls.

    Args:
        call_format: how the model writes calls.
    """

    def __init__(self, call_format: ToolCallFormat) -> None:
        self._format = call_format
        # Of each choice of a stream.
        self._parsers: dict[int, ToolCallParser] = {}

    def deltas(self, choice: int, text: str) -> list[dict[str, Any]]:
        """Return the pieces of a choice's message that are certain with its next text; they may be none.

        Args:
            choice: the choice that the text belongs to.
            text: the next piece of its answer.
        """
        return [_written(one) for one in self._parser(choice).push(text)]

    def last_deltas(self, choice: int) -> list[dict[str, Any]]:
        """Return the pieces of a choice's message that were held back, once its answer has ended."""
        return [_written(one) for one in self._parser(choice).finish()]

    def reason(self, choice: int, reason: str) -> str:
        """Return why a choice of a stream ended, in the API's words."""
        return "tool_calls" if _ends_in_calls(self._parser(choice), reason) else reason

    def message(self, text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
        """Return what the message of a whole answer says, and why the answer ended.

        Args:
            text: the answer.
            reason: why it ended, in prefill's words.
        """
        parser = ToolCallParser(self._format)
        deltas = parser.push(text) + parser.finish()
        content = "".join(one.text for one in deltas if isinstance(one, ContentDelta))
        calls = [
            _call([one for one in deltas if isinstance(one, CallDelta) and one.index == place])
            for place in range(parser.calls)
        ]
        said = {"content": content or None, "tool_calls": calls} if calls else {"content": content}
        return said, "tool_calls" if _ends_in_calls(parser, reason) else reason

    def _parser(self, choice: int) -> ToolCallParser:
        if choice not in self._parsers:
            self._parsers[choice] = ToolCallParser(self._format)
        return self._parsers[choice]


def _ends_in_calls(parser: ToolCallParser, reason: str | None) -> bool:
    """Return whether an answer has calls and is complete; one that was cut off keeps its own reason."""
    return parser.calls > 0 and reason == "stop"


def _call(deltas: Sequence[CallDelta]) -> dict[str, Any]:
    """Return a whole call, put together out of its pieces."""
    function = {"name": deltas[0].name, "arguments": "".join(one.arguments for one in deltas)}
    return {"id": deltas[0].id, "type": "function", "function": function}


def _written(delta: Delta) -> dict[str, Any]:
    """Return a piece of text or of a call; the first of a call names it."""
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if not delta.id:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]}
    return {"tool_calls": [{"index": delta.index, **_call([delta])}]}
