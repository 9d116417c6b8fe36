"""Processors that make tokens less likely that came before, or more likely."""

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.processors.base import History, Processor, Stage, processor
from spectrumkv.common.generation.vocabulary import Vocabulary


@processor("repetition_penalty", Stage.PENALIZE)
def repetition_penalty(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what divides the positive scores of tokens in prompt and answer, and multiplies their negative ones.

    The method is CTRL's (Keskar et al., arXiv 1909.05858, section 4.1), with the prompt counted as vLLM does.
    """
    if params.repetition_penalty == 1:
        return None
    penalize = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))

    def penalized(scores: torch.Tensor, history: History) -> torch.Tensor:
        seen = [*history.prompt, *(history.counts.keys() - history.prompt)]
        if not seen:
            return scores
        result: torch.Tensor = penalize(torch.tensor([seen]), scores.unsqueeze(0))[0]
        return result

    return penalized


@processor("presence_and_frequency_penalty", Stage.PENALIZE)
def presence_and_frequency_penalty(params: SamplingParams, _: Vocabulary | None) -> Processor | None:
    """Return what subtracts from the scores of generated tokens, as the OpenAI API defines both penalties."""
    if not params.presence_penalty and not params.frequency_penalty:
        return None

    def penalized(scores: torch.Tensor, history: History) -> torch.Tensor:
        if not history.counts:
            return scores
        counts = torch.tensor(list(history.counts.values()), dtype=torch.float64)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        return scores.index_add(0, torch.tensor(list(history.counts)), penalties, alpha=-1)

    return penalized
