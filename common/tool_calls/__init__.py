"""Tool calls in the text of an answer: how families of models write them, and a parser for text as it arrives.

Nothing here needs torch or a tokenizer: the gateway and the client read answers with it.
"""

from spectrumkv.common.tool_calls.formats import FORMATS, ToolCallFormat, format_of_template
from spectrumkv.common.tool_calls.parser import CallDelta, Delta, TextDelta, ToolCallParser

__all__ = [
    "FORMATS",
    "CallDelta",
    "Delta",
    "TextDelta",
    "ToolCallFormat",
    "ToolCallParser",
    "format_of_template",
]
