"""Talk to a SpectrumKV server: the Python client, and in `cli` the `spectrumkv` command.

Importing the client loads neither torch nor transformers.
"""

from spectrumkv.client.client import CompletionStream, SpectrumClient
from spectrumkv.client.completion import Completion, Timings, TokenEvent, Usage
from spectrumkv.client.request import KvChoice, Message, Request, Sampling, TokenIds

__all__ = [
    "Completion",
    "CompletionStream",
    "KvChoice",
    "Message",
    "Request",
    "Sampling",
    "SpectrumClient",
    "Timings",
    "TokenEvent",
    "TokenIds",
    "Usage",
]
