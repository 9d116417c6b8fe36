"""Talk to a SpectrumKV server: the Python client, and in `cli` the `spectrumkv` command.

Importing the client loads neither torch nor transformers.
"""

from spectrumkv.client.client import CompletionStream, SpectrumClient
from spectrumkv.client.completion import Answer, Completion, PromptToken, TokenEvent, Usage
from spectrumkv.client.kv_map import KvMap
from spectrumkv.client.request import KvChoice, Message, Request, Sampling, TokenIds
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.client.timings import Timings
from spectrumkv.client.tools import Tool, ToolCall, Tools

__all__ = [
    "Answer",
    "Completion",
    "CompletionStream",
    "KvChoice",
    "KvMap",
    "Message",
    "PromptToken",
    "Request",
    "Sampling",
    "SpectrumClient",
    "StructuredOutput",
    "Timings",
    "TokenEvent",
    "TokenIds",
    "Tool",
    "ToolCall",
    "Tools",
    "Usage",
]
