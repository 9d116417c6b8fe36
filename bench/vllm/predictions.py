"""Has vLLM read a text token by token, and compares what it predicts over one KV and another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrumkv.bench.vllm.engine import Engine
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.prefill_server.tuning.divergence import Distance

PROCESSOR = "spectrumkv.bench.vllm.forced_tokens:ForcedTokens"
# How vLLM writes a token where its text is not wanted.
_TOKEN_PREFIX = "token_id:"  # noqa: S105  # not a secret


@dataclass(frozen=True)
class Prediction:
    """What a server says about the next token.

    Attributes:
        logprobs: natural logarithms of probabilities by token id: of the most likely tokens, and of the target.
        target: the token that really comes next.
    """

    logprobs: Mapping[int, float]
    target: int

    @property
    def most_likely(self) -> int:
        """Return the most likely token."""
        return max(self.logprobs, key=self.logprobs.__getitem__)


def read_on(
    engine: Engine, token_ids: Sequence[int], targets: Sequence[int], most: int, **others: Any
) -> list[Prediction]:
    """Have a server decode a text, and take its predictions of each token from those before.

    Args:
        engine: the server; it runs `ForcedTokens`.
        token_ids: the prompt.
        targets: the m tokens after it.
        most: how many of the most likely tokens to ask for; -1 asks for all.
        **others: further fields of the request.

    Returns:
        m predictions.

    Raises:
        FailedPreconditionError: the server generates other tokens.
        UnavailableError: the server does not answer, or refuses.
    """
    answer = engine.complete(
        list(token_ids),
        len(targets),
        logprobs=most,
        ignore_eos=True,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
        vllm_xargs={"forced_tokens": list(targets)},
        **others,
    )
    choice = answer["choices"][0]
    if choice["token_ids"] != list(targets):
        raise FailedPreconditionError(
            f"{engine.url} generates other tokens than the text's; start it with --logits-processors {PROCESSOR}"
        )
    return [
        Prediction({int(name.removeprefix(_TOKEN_PREFIX)): value for name, value in listed.items()}, target)
        for listed, target in zip(choice["logprobs"]["top_logprobs"], targets, strict=True)
    ]


def compare(received: Sequence[Prediction], exact: Sequence[Prediction]) -> Distance:
    """Compare predictions of the same tokens.

    Args:
        received: over received KV.
        exact: over exact KV.

    Returns:
        Sums over the tokens, in nats; of the KL divergence a lower bound, see `divergence`.
    """
    pairs = list(zip(received, exact, strict=True))
    return Distance(
        nll=-sum(one.logprobs[one.target] for one in received),
        nll_fp16=-sum(one.logprobs[one.target] for one in exact),
        kl=sum(divergence(ours.logprobs, theirs.logprobs) for ours, theirs in pairs),
        agreed=sum(ours.most_likely == theirs.most_likely for ours, theirs in pairs),
    )


def divergence(received: Mapping[int, float], exact: Mapping[int, float]) -> float:
    """Return the KL divergence of a prediction from an exact one, where tokens that one of them lacks are one event.

    Merging events never raises a divergence (data processing inequality), so that this is a lower bound of the
    divergence over all tokens; what it leaves out is how the merged tokens differ from each other. Nothing is left
    out where both have all tokens.

    Args:
        received: natural logarithms of probabilities by token id.
        exact: like `received`.

    Returns:
        KL(exact || received) in nats.
    """
    shared = received.keys() & exact.keys()
    kl = math.fsum(math.exp(exact[token]) * (exact[token] - received[token]) for token in shared)
    others, others_received = (1 - math.fsum(math.exp(one[token]) for token in shared) for one in (exact, received))
    # Rounding may leave less than nothing where the tokens are nearly all.
    return kl + others * math.log(others / others_received) if others > 0 and others_received > 0 else kl
