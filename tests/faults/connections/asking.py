"""An honest client that asks while others mean harm, and how long its answers take."""

import statistics
import time

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling, TokenIds

PROMPT = TokenIds(tuple(range(100, 148)))
ANSWER_TOKENS = 12
WAIT_SECONDS = 20.0


def ask(client: SpectrumClient, tokens: int = ANSWER_TOKENS, timeout: float = WAIT_SECONDS) -> float:
    """Return the seconds that a request takes, whose answer is whole."""
    started = time.monotonic()
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    completion = client.generate(PROMPT, sampling=sampling, timeout=timeout).result()
    assert len(completion.tokens) == tokens
    return time.monotonic() - started


def median_of(client: SpectrumClient, requests: int) -> float:
    """Return the median of the seconds that so many requests take, one after another."""
    return statistics.median(ask(client) for _ in range(requests))
