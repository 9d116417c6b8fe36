"""Tool calls in the text of an answer: how families of models write them, and a parser for text as it arrives.

Nothing here needs torch or a tokenizer, so that whoever gets an answer can read it. Services and client pass the text
on as the model writes it.
"""

from spectrumkv.common.tool_calls.formats import FORMATS, ToolCallFormat, format_of_template
from spectrumkv.common.tool_calls.parser import CallDelta, ContentDelta, Delta, ToolCallParser

__all__ = [
    "FORMATS",
    "CallDelta",
    "ContentDelta",
    "Delta",
    "ToolCallFormat",
    "ToolCallParser",
    "format_of_template",
]
