"""The processor that holds an answer to its form."""

import math

import numpy as np
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.processors.base import History, Processor, Stage, processor
from spectrumkv.common.generation.structured.grammar import reason
from spectrumkv.common.generation.vocabulary import Vocabulary


@processor("structured_output", Stage.EXCLUDE)
def structured_output(params: SamplingParams, vocabulary: Vocabulary | None) -> Processor | None:
    """Return what rules out the tokens after which the answer cannot have its form any more.

    The tokens that are in the answer already, such as the one that prefill sampled, are matched first: the state
    follows from them alone and need not cross the hand-off.
    """
    if params.structured_output is None:
        return None
    assert vocabulary is not None
    matcher = vocabulary.grammars.matcher(params.structured_output)
    matched = 0

    def exclude(scores: torch.Tensor, history: History) -> torch.Tensor:
        nonlocal matched
        for token_id in history.generated[matched:]:
            # What comes after the end, with ignore_eos, has no form any more.
            if not matcher.is_stopped():
                matcher.consume_token(token_id)
        matched = len(history.generated)
        if matcher.is_error():
            raise InvalidArgumentError(
                f"structured_output cannot be held to after {matched} tokens: {reason(matcher)}"
            )
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, count=len(scores), bitorder="little").view(np.bool_))
        return scores.masked_fill(~allowed, -math.inf)

    return exclude
