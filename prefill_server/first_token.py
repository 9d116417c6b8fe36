"""The token that prefill samples: once for a request, from exact KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import TextStream, token_message
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.transfer import FirstToken
from spectrumkv.v1 import generation_pb2


@dataclass(frozen=True)
class FirstResponse:
    """Holds the first token, as the client and decode get it.

    Attributes:
        message: the token for the client.
        finish: why the generation ends with this token; None where it goes on.
    """

    message: generation_pb2.Token
    finish: generation_pb2.FinishReason | None

    @property
    def token(self) -> FirstToken:
        """Return the token for decode."""
        return FirstToken(self.message.token_id, finished=self.finish is not None)


def sample_first(
    loaded: LoadedModel, params: SamplingParams, token_ids: Sequence[int], logits: torch.Tensor
) -> FirstResponse:
    """Sample a request's first token.

    Args:
        loaded: the model.
        params: how tokens are chosen.
        token_ids: the prompt.
        logits: float32 `[vocab]` on the CPU, what the model computed for the prompt's last token.

    Returns:
        The token, and whether the generation ends with it.

    Raises:
        InternalError: a logit is infinite or NaN, or the tokenizer cannot decode tokens one by one.
    """
    sampled = Sampler(params, token_ids).sample(logits, 0)
    delta = TextStream(loaded.tokenizer, params, loaded.eos_token_ids, token_ids).push(sampled.token_id)
    finish = None if delta.finish is None else delta.finish.to_proto()
    return FirstResponse(token_message(0, sampled, delta.text), finish)
