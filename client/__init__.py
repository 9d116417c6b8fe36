"""The Python client and the `spectrumkv` command."""

from spectrumkv.client.client import CompletionStream, SpectrumClient
from spectrumkv.client.completion import Completion, TokenEvent, Usage
from spectrumkv.client.request import KvChoice, Message, Request, Sampling, TokenIds
from spectrumkv.client.timings import Timings

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
