"""Sampled tokens as messages."""

from spectrumkv.common.generation.sampling import SampledToken
from spectrumkv.v1 import generation_pb2


def token_message(index: int, sampled: SampledToken, text: str) -> generation_pb2.Token:
    """Return the message for one generated token and the text that became certain with it."""
    return generation_pb2.Token(
        index=index,
        token_id=sampled.token_id,
        text=text,
        logprob=sampled.logprob,
        top_logprobs=[
            generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in sampled.top_logprobs
        ],
    )
