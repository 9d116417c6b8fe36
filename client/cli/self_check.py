"""One request through a running deployment twice, as it serves by default and over exact KV, and what follows."""

import math
from dataclasses import dataclass

from spectrumkv.client.cli.demo import QUESTION, document
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion, TokenEvent
from spectrumkv.client.request import KvChoice, Message, Sampling
from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.v1 import prefill_pb2

# Sent with the model's own bits: what one process would have computed.
EXACT = KvChoice(policy="native")
MAX_TOKENS = 32
TOP_LOGPROBS = 20
# Long enough for a spectrum of tiers, short enough for a CPU.
DOCUMENT_CHARACTERS = 3000
# By how much counted bytes may exceed what was asked for: block headers, tier maps and scales of codecs whose budget
# does not count them.
BUDGET_SLACK = 0.06


@dataclass(frozen=True)
class CheckResult:
    """What a deployment answered.

    Attributes:
        server: the prefill service asked.
        budget_target: the budget that it has by default.
        served: the completion at its defaults.
        exact: the completion over KV as the model computed it.
        max_kl: what divergence is allowed.
    """

    server: str
    budget_target: float
    served: Completion
    exact: Completion
    max_kl: float

    @property
    def agreeing_tokens(self) -> int:
        """How many tokens the two answers have in common before they part."""
        pairs = zip(self.served.token_ids, self.exact.token_ids, strict=False)
        return next((place for place, (one, other) in enumerate(pairs) if one != other), len(self.exact.token_ids))

    @property
    def kl(self) -> float:
        """Mean divergence in nats of the served from the exact next-token distribution, over the likeliest tokens.

        Over the tokens up to and with the first that differs: they have the same text before them. The first token is
        prefill's own and left out. A lower bound, since unlisted tokens count as if they were the last one listed.
        """
        places = range(1, min(self.agreeing_tokens + 1, len(self.exact.tokens), len(self.served.tokens)))
        found = [_divergence(self.exact.tokens[place], self.served.tokens[place]) for place in places]
        return sum(found) / len(found) if found else 0.0

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each; nothing where all is well."""
        usage = self.served.usage
        recomputed = usage.recomputed_prompt_tokens + self.exact.usage.recomputed_prompt_tokens
        tier_bytes = sum(one.bytes for one in usage.tiers)
        found = [
            (recomputed > 0, f"decode computed {recomputed} prompt tokens again: the KV that was sent is not used"),
            (self.agreeing_tokens == 0, "the first token, which no KV has a part in, differs between two runs"),
            (not 0 < tier_bytes <= usage.kv_bytes_sent, f"{tier_bytes} bytes of KV in {usage.kv_bytes_sent} sent"),
            (
                usage.byte_budget > self.budget_target + BUDGET_SLACK,
                f"the counted budget is {usage.byte_budget:.3f} where {self.budget_target:g} is served by default",
            ),
            (
                not self.kl <= self.max_kl,
                f"the model's predictions over the KV that was sent diverge by {self.kl:.3f} nats from those over "
                f"exact KV; at most {self.max_kl:g} are allowed (--max-kl)",
            ),
        ]
        return [sentence for is_wrong, sentence in found if is_wrong]


def self_check(client: SpectrumClient, timeout: float, max_kl: float) -> CheckResult:
    """Ask a deployment the same twice.

    Args:
        client: of its prefill service.
        timeout: seconds for each request.
        max_kl: divergence that is allowed, in nats.

    Raises:
        FailedPreconditionError: it is no prefill service, or not ready.
        SpectrumKVError: it refused or ended a request.
    """
    if not client.is_serving():
        raise FailedPreconditionError(f"{client.address} is not ready")
    info = client.server_info()
    if not isinstance(info, prefill_pb2.PrefillServiceGetServerInfoResponse):
        raise FailedPreconditionError(f"{client.address} is a decode service; name the prefill service before it")
    prompt = [Message("user", f"{document()[:DOCUMENT_CHARACTERS]}\n\n{QUESTION}")]
    sampling = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=TOP_LOGPROBS)
    served, exact = (
        client.generate(prompt, sampling=sampling, kv=kv, timeout=timeout).result() for kv in (KvChoice(), EXACT)
    )
    return CheckResult(client.address, info.defaults.budget, served, exact, max_kl)


def _divergence(exact: TokenEvent, served: TokenEvent) -> float:
    listed = {one.token_id: one.logprob for one in served.top_logprobs}
    if not listed or not exact.top_logprobs:
        return math.inf
    least = min(listed.values())
    terms = (math.exp(one.logprob) * (one.logprob - listed.get(one.token_id, least)) for one in exact.top_logprobs)
    return max(0.0, sum(terms))
