"""When two answers over quantized KV count as the same.

A quantizer makes a step of what differs in the last bit, so tokens may part. Up to there both have the same text
before each token, and what the model predicts there can be compared (ADR 32 does the same).
"""

from spectrumkv.client.completion import Completion, TokenEvent

# As many as can be asked for.
TOP_LOGPROBS = 20
# In nats: what shared passes and batches may change. ADR 38 says what was measured.
ALLOWED = 0.01


def parting(one: Completion, other: Completion) -> int:
    """How many tokens two answers, one of which may be shorter, have in common before they part."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    shorter = min(len(one.tokens), len(other.tokens))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), shorter)


def disagreement(one: Completion, other: Completion) -> float:
    """Largest difference of a token's log-probability, in nats, up to and with the first token that differs.

    Both were asked for the `TOP_LOGPROBS` likeliest tokens. One that only one of them lists is at most as likely in
    the other as the last one listed there. Where greedy answers part, the two tokens' logits lie within twice this.
    """
    places = range(min(parting(one, other) + 1, len(one.tokens), len(other.tokens)))
    return max((_difference(one.tokens[place], other.tokens[place]) for place in places), default=0.0)


def _difference(one: TokenEvent, other: TokenEvent) -> float:
    mine = {listed.token_id: listed.logprob for listed in one.top_logprobs}
    theirs = {listed.token_id: listed.logprob for listed in other.top_logprobs}
    assert len(mine) == len(theirs) == TOP_LOGPROBS
    both = [abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()]
    only_mine = [mine[token] - min(theirs.values()) for token in mine.keys() - theirs.keys()]
    only_theirs = [theirs[token] - min(mine.values()) for token in theirs.keys() - mine.keys()]
    return max(both + only_mine + only_theirs)
