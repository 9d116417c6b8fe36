"""The tokens that prefill samples: one for each answer of a request, from exact KV."""

from collections.abc import Sequence

import torch

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import TextStream, token_message
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.v1 import generation_pb2


def sample_first(
    loaded: LoadedModel, params: SamplingParams, token_ids: Sequence[int], logits: torch.Tensor
) -> tuple[generation_pb2.Token, ...]:
    """Sample the first token of each answer.

    Args:
        loaded: the model.
        params: how tokens are chosen.
        token_ids: the prompt.
        logits: float32 `[vocab]` on the CPU, what the model computed for the prompt's last token.

    Returns:
        The tokens for the client, in the order of the answers; one that ends its answer says why.

    Raises:
        InternalError: a logit is infinite or NaN, or the tokenizer cannot decode tokens one by one.
    """
    first = []
    for answer, of_answer in enumerate(params.answers()):
        sampled = Sampler(of_answer, token_ids, loaded.vocabulary).sample(logits, 0)
        delta = TextStream(loaded.tokenizer, of_answer, loaded.eos_token_ids, token_ids).push(sampled.token_id)
        first.append(token_message(0, sampled, delta, answer))
    return tuple(first)
