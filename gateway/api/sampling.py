"""Hold the fields that completions and chat completions share: sampling, the KV choice, and what is refused."""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, model_validator

from spectrumkv.client.request import KvChoice, Sampling
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.params import MAX_BIASED_TOKENS
from spectrumkv.gateway.api.fields import (
    OPENAI,
    SPECTRUMKV,
    VLLM,
    Entries,
    FieldError,
    Ignored,
    Number,
    Refused,
    RequestFields,
    Switch,
    Text,
    Whole,
    supported,
)
from spectrumkv.gateway.api.kv import KvFields
from spectrumkv.gateway.api.structured import ResponseFormat, StructuredOutputs

_NO_CONTROL = "steer single tokens with logit_bias or bad_words; leave it out"


class StreamOptions(RequestFields):
    """Say what a stream has beside the answer's pieces."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "continuous_usage_stats": Refused(
            VLLM, "usage is known at the end of the answer; ask for it with include_usage", (False,)
        ),
        "include_obfuscation": Refused(OPENAI, "events are not padded; leave it out or send false", (False,)),
    }

    include_usage: Switch | None = supported(OPENAI, "a last event with `usage`")


IGNORED: Mapping[str, Ignored] = {
    "user": Ignored(OPENAI, "names the caller's own user, for abuse reports"),
    "metadata": Ignored(OPENAI, "the caller's own labels of what is stored; nothing is"),
    "store": Ignored(OPENAI, "whether the provider keeps the answer; this server keeps none"),
    "service_tier": Ignored(OPENAI, "chooses among the provider's prices"),
    "safety_identifier": Ignored(OPENAI, "names the caller's own user, for abuse reports"),
    "prompt_cache_key": Ignored(OPENAI, "steers the provider's cache of prompts; there is none here"),
    "prompt_cache_retention": Ignored(OPENAI, "steers the provider's cache of prompts; there is none here"),
    "cache_salt": Ignored(VLLM, "separates entries of a cache of prompts; there is none here"),
}

REFUSED: Mapping[str, Refused] = {
    "allowed_token_ids": Refused(VLLM, _NO_CONTROL),
    "logits_processors": Refused(VLLM, _NO_CONTROL),
    "use_beam_search": Refused(VLLM, "answers are sampled, not searched for; leave it out", (False,)),
    "length_penalty": Refused(VLLM, "it belongs to beam search, which there is none of; leave it out", (1, 1.0)),
    "truncate_prompt_tokens": Refused(VLLM, "a prompt is used whole or refused; shorten it"),
    "include_stop_str_in_output": Refused(VLLM, "an answer ends before its stop string; leave it out", (False,)),
    "skip_special_tokens": Refused(VLLM, "the text never has special tokens; return_token_ids has them", (True,)),
    "spaces_between_special_tokens": Refused(VLLM, "the text never has special tokens; leave it out", (True, False)),
    "add_special_tokens": Refused(VLLM, "the tokenizer's own rule decides; send token ids to decide", (True,)),
    "priority": Refused(VLLM, "requests are served in one order, short prompts first; leave it out", (0,)),
    "kv_transfer_params": Refused(VLLM, "prefill hands KV to decode by itself; steer it with the field kv"),
    "vllm_xargs": Refused(VLLM, "these are extensions of vLLM's; leave it out", ({},)),
    "repetition_detection": Refused(VLLM, "repetition ends no answer; leave it out"),
    "guided_json": Refused(VLLM, "it is called structured_outputs.json now"),
    "guided_regex": Refused(VLLM, "it is called structured_outputs.regex now"),
    "guided_choice": Refused(VLLM, "it is called structured_outputs.choice now"),
    "guided_grammar": Refused(VLLM, "it is called structured_outputs.grammar now"),
    "prompt_embeds": Refused(VLLM, "prompts are text or token ids; send one of those"),
}


def _read_bias(value: object) -> object:
    """Return biases by whole numbers; JSON has texts as keys.

    Raises:
        FieldError: a key is no whole number, or there are more than any service takes.
    """
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASED_TOKENS:
        raise FieldError(f"logit_bias has {len(value)} tokens; allowed: at most {MAX_BIASED_TOKENS}")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20):
            raise FieldError(f'logit_bias has the key {reprlib.repr(key)}; allowed: token ids, such as "50256"')
    return {int(key): bias for key, bias in value.items()}


class SamplingFields(RequestFields):
    """Hold what completions and chat completions have in common."""

    refused: ClassVar[Mapping[str, Refused]] = REFUSED
    ignored: ClassVar[Mapping[str, Ignored]] = IGNORED

    model: Text | None = supported(OPENAI, "must be the served model, which `/v1/models` names; left out, it is")
    stream: Switch | None = supported(OPENAI, "the answer comes as server-sent events")
    stream_options: StreamOptions | None = supported(OPENAI, "`include_usage`; only where `stream` is set")
    temperature: Number | None = supported(OPENAI, "divides the logits; 0 is greedy. Left out: 1")
    top_p: Number | None = supported(OPENAI, "draws from the smallest set of tokens of this probability")
    top_k: Whole | None = supported(VLLM, "draws from the k likeliest tokens; 0 and -1 are all")
    repetition_penalty: Number | None = supported(VLLM, "divides the logits of tokens seen before")
    presence_penalty: Number | None = supported(OPENAI, "subtracted from the logits of tokens generated before")
    frequency_penalty: Number | None = supported(OPENAI, "the same, once for each time that they were generated")
    min_p: Number | None = supported(VLLM, "draws from tokens at least this fraction as likely as the likeliest")
    logit_bias: Annotated[dict[int, Number] | None, BeforeValidator(_read_bias)] = supported(
        OPENAI, "added to the logits of single tokens, by token id"
    )
    min_tokens: Whole | None = supported(VLLM, "no answer ends before so many tokens")
    bad_words: Entries[Text] | None = supported(VLLM, "texts that are not generated")
    n: Whole | None = supported(
        OPENAI, "so many answers to a prompt, whose KV is sent once; seeds count up from `seed`"
    )
    response_format: ResponseFormat | None = supported(OPENAI, "the form of the answer: JSON, or JSON by a schema")
    structured_outputs: StructuredOutputs | None = supported(
        VLLM, "the form of the answer: JSON, a regular expression, a grammar, one of several texts"
    )
    prompt_logprobs: Whole | None = supported(VLLM, "log-probabilities of the prompt's tokens; not with `stream`")
    seed: Whole | None = supported(OPENAI, "same seed, same tokens, whatever else is served; modulo 2⁶⁴")
    stop: Text | Entries[Text] | None = supported(OPENAI, "the answer ends before one of these texts")
    stop_token_ids: Entries[Whole] | None = supported(VLLM, "the answer ends at one of these tokens")
    ignore_eos: Switch | None = supported(VLLM, "the answer goes on after the model's end-of-sequence tokens")
    return_token_ids: Switch | None = supported(VLLM, "each choice has the ids of its tokens as `token_ids`")
    return_tokens_as_token_ids: Switch | None = supported(VLLM, "log-probabilities name tokens as `token_id:5`")
    request_id: Text | None = supported(VLLM, "names the request in logs, as the header x-request-id does")
    kv: KvFields | None = supported(SPECTRUMKV, "how the prompt's KV is sent: `policy budget scorer codec scope map`")

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options is given without stream; set stream to true", "stream_options")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> "SamplingFields":
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs is given with stream; ask for a whole answer", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_map(self) -> "SamplingFields":
        if self.map_detail is not None and self.stream and not self.includes_usage:
            raise FieldError("map is a part of usage; set stream_options.include_usage to true", "kv.map")
        return self

    @property
    def map_detail(self) -> str | None:
        """What map of the prompt's precision the client asks for; None is none."""
        return None if self.kv is None else self.kv.map_detail

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with an event that has `usage`."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def kv_choice(self) -> KvChoice:
        """Return how the prompt's KV is sent."""
        return KvChoice() if self.kv is None else self.kv.choice()

    def sampling_with(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Return how tokens are sampled.

        Args:
            max_tokens: the most tokens of the answer; None is the server's default.
            logprobs: how many of the likeliest tokens are reported for each token; None reports none.

        Raises:
            InvalidArgumentError: a value does not fit the services' messages.
        """
        return Sampling(**self._sampling(), max_tokens=max_tokens, logprobs=logprobs)

    def _sampling(self) -> dict[str, Any]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            # The API's default. The services' own is greedy.
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": tuple(stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "min_p": self.min_p,
            "logit_bias": self.logit_bias or {},
            "min_tokens": self.min_tokens,
            "bad_words": tuple(self.bad_words or ()),
            "n": self.n,
            "structured_output": self._form(),
        }

    def _form(self) -> StructuredOutput | None:
        """Return the form that answers must have; None is any.

        Raises:
            InvalidArgumentError: two forms are given.
        """
        formats = self.response_format.form() if self.response_format is not None else None
        if self.structured_outputs is None:
            return formats
        if formats is not None:
            raise InvalidArgumentError("response_format and structured_outputs are both given; give one of them")
        return self.structured_outputs.form()
