"""Processors that rule tokens out, or prefer some, whatever the model says."""

import math

import torch

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.processors.base import History, Processor, Stage, processor
from spectrumkv.common.generation.vocabulary import Vocabulary, ending_token_ids


@processor("logit_bias", Stage.EXCLUDE)
def logit_bias(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what adds a number to the scores of some tokens."""
    if not params.logit_bias:
        return None
    ids = torch.tensor(list(params.logit_bias))
    values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float64)
    return lambda scores, _: scores.index_add(0, ids, values)


@processor("min_tokens", Stage.EXCLUDE)
def min_tokens(params: SamplingParams, vocabulary: Vocabulary | None) -> Processor | None:
    """Return what lets no token end the answer before it has a number of tokens."""
    if not params.min_tokens:
        return None
    assert vocabulary is not None
    ending = torch.tensor(
        sorted(ending_token_ids(vocabulary.tokenizer, vocabulary.eos_token_ids, params)), dtype=torch.int64
    )

    def exclude(scores: torch.Tensor, history: History) -> torch.Tensor:
        if len(history.generated) >= params.min_tokens:
            return scores
        return scores.index_fill(0, ending, -math.inf)

    return exclude


@processor("bad_words", Stage.EXCLUDE)
def bad_words(params: SamplingParams, vocabulary: Vocabulary | None) -> Processor | None:
    """Return what completes none of the texts that are not wanted, as vLLM reads its parameter of that name."""
    if not params.bad_words:
        return None
    assert vocabulary is not None
    spellings = [ids for word in params.bad_words for ids in vocabulary.spellings(word)]

    def exclude(scores: torch.Tensor, history: History) -> torch.Tensor:
        last = [ids[-1] for ids in spellings if len(ids) == 1 or tuple(history.generated[1 - len(ids) :]) == ids[:-1]]
        return scores.index_fill(0, torch.tensor(last, dtype=torch.int64), -math.inf) if last else scores

    return exclude
