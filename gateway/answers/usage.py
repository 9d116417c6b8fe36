"""Write what answers used: OpenAI's counts, and under `kv` what sending the prompt's KV took."""

from collections.abc import Sequence
from typing import Any

from spectrumkv.client.completion import Completion

_COUNTED_BY_OPENAI = ("prompt_tokens", "completion_tokens")


def usage_of(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the `usage` of a response.

    Args:
        completions: of each prompt, in order; at least one.

    Returns:
        Counts over all prompts, and `kv`: for one prompt an object with counted bytes, tokens and bytes by tier,
        TTFT, hand-off and worker, and the map where the request asked for it; for several a list of such objects.
    """
    prompt, completion = (sum(getattr(one.usage, name) for one in completions) for name in _COUNTED_BY_OPENAI)
    each = [_kv_of(one) for one in completions]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "kv": each[0] if len(each) == 1 else each,
    }


def _kv_of(completion: Completion) -> dict[str, Any]:
    used = completion.usage
    fields = {name: value for name, value in used.as_json().items() if name not in _COUNTED_BY_OPENAI}
    fields["tiers"] = {one.tier: {"tokens": one.tokens, "bytes": one.bytes} for one in used.tiers}
    if completion.kv_map is not None:
        fields["map"] = {"texts": [one.text for one in completion.prompt_tokens], **completion.kv_map.as_json()}
    return fields
