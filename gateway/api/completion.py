"""Read requests for `/v1/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.gateway.api.fields import OPENAI, FieldError, Refused, Switch, Whole, supported
from spectrumkv.gateway.api.sampling import REFUSED, SamplingFields

# What OpenAI and vLLM take where a request does not say.
DEFAULT_MAX_TOKENS = 16
# Prompts of one request; each is a request of its own to prefill.
MAX_PROMPTS = 128
# A prompt of a million tokens is more than any model here takes.
MAX_TOKEN_IDS = 1 << 20

Prompts = tuple[str | TokenIds, ...]


def _read_prompts(value: object) -> Prompts:
    """Return the prompts: a text, a list of texts, a list of token ids, or a list of such lists.

    Raises:
        FieldError: the value is something else, or has too many prompts.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise FieldError("prompt is no text and no list with something in it; allowed: a text, token ids, or a list")
    if isinstance(value[0], int):
        return (_token_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise FieldError(f"prompt has {len(value)} prompts; allowed: at most {MAX_PROMPTS} in one request")
    return tuple(one if isinstance(one, str) else _token_ids(one) for one in value)


def _token_ids(value: object) -> TokenIds:
    """Return a list as token ids.

    Raises:
        FieldError: it is none, or too long.
    """
    if not isinstance(value, list) or any(type(one) is not int for one in value):
        raise FieldError("prompt has an entry that is neither a text nor a list of token ids; allowed: those")
    if len(value) > MAX_TOKEN_IDS:
        raise FieldError(f"prompt has {len(value)} token ids; allowed: at most {MAX_TOKEN_IDS}")
    return TokenIds(tuple(value))


class CompletionFields(SamplingFields):
    """Hold the body of `/v1/completions`."""

    refused: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "best_of": Refused(OPENAI, "all answers are returned, none chosen; leave it out", (1,)),
        "suffix": Refused(OPENAI, "text is generated after the prompt only, not before a suffix", ("",)),
    }

    prompt: Annotated[Any, BeforeValidator(_read_prompts)] = supported(
        OPENAI, "a text, token ids, or a list of either; each is answered as a choice", ...
    )
    max_tokens: Whole | None = supported(OPENAI, f"the most tokens of an answer. Left out: {DEFAULT_MAX_TOKENS}")
    logprobs: Whole | None = supported(OPENAI, "log-probabilities of the answer's and of so many likeliest tokens")

    echo: Switch | None = supported(OPENAI, "the prompt comes before the answer; with `logprobs`, so do its tokens")

    @property
    def prompts(self) -> Prompts:
        """The prompts, at least one."""
        prompts: Prompts = self.prompt
        return prompts

    def sampling(self) -> Sampling:
        """Return how tokens are sampled.

        Raises:
            InvalidArgumentError: a value does not fit the services' messages.
        """
        return self.sampling_with(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs)
