"""Holds the sampling parameters of a request; their defaults and limits are stated here only."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.common.generation.structured.form import StructuredOutput
from spectrumkv.v1 import generation_pb2

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1
MAX_TEMPERATURE = 100
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_TEXT_CHARACTERS = 256
MAX_STOP_TOKENS = 256
MAX_PENALTY = 2
MAX_LOGIT_BIAS = 100
MAX_BIASED_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_ANSWERS = 64

# The message's fields that may be unset.
OPTIONAL_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "logprobs",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "min_tokens",
    "n",
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The way in which tokens are chosen and generation ends; see `SamplingParams` in generation.proto.

    Attributes:
        max_tokens: most tokens to generate, 1 or more.
        temperature: 0 is greedy; at most 100.
        top_p: smallest set of tokens whose probabilities sum to at least this, in (0, 1]; 1 is all.
        top_k: only the k likeliest tokens, and those as likely as the k-th; 0 is all. May exceed the vocabulary size.
        repetition_penalty: divides positive logits of tokens in the prompt or generated so far and multiplies
            negative ones; 1 is none; from 0.01 to 100.
        seed: 0 to 2**64 - 1; None until `with_seed` has drawn one.
        stop: generation ends before the first of these; up to 16 of up to 256 characters each, none empty.
        stop_token_ids: generation ends at any of these, up to 256.
        ignore_eos: go on after the model's end-of-sequence tokens.
        logprobs: give the log-probability of each token and of this many likeliest tokens, 0 to 20; None is none.
        presence_penalty: subtracted once from the logit of each token that was generated, from -2 to 2.
        frequency_penalty: subtracted from a token's logit for each time that it was generated, from -2 to 2.
        min_p: only tokens at least this fraction as likely as the likeliest one, from 0 (all) to 1.
        logit_bias: added to the logits of tokens, by id: from -100 to 100, for at most 1024 tokens.
        min_tokens: tokens before which nothing but max_tokens ends the generation; at most max_tokens.
        bad_words: texts that are not generated; up to 256 of up to 256 characters each, none empty.
        n: how many answers to generate, 1 to 64.
        structured_output: the form of every answer's text; None is any.

    Raises:
        InvalidArgumentError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()
    n: int = 1
    structured_output: StructuredOutput | None = None

    def __post_init__(self) -> None:
        _check_whole("max_tokens", self.max_tokens, 1, UINT32_MAX)
        _check_number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise _refusal("top_p", self.top_p, "a number greater than 0 and at most 1; for greedy set temperature 0")
        _check_whole("top_k", self.top_k, 0, UINT32_MAX)
        _check_number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, UINT64_MAX)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_texts("stop", self.stop, MAX_STOP_STRINGS)
        _check_stop_tokens(self.stop_token_ids)
        _check_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("min_p", self.min_p, 0, 1)
        _check_logit_bias(self.logit_bias)
        _check_whole("min_tokens", self.min_tokens, 0, UINT32_MAX)
        if self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        _check_texts("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_whole("n", self.n, 1, MAX_ANSWERS)
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "true or false")

    def with_seed(self) -> "SamplingParams":
        """Return these parameters with a seed: their own, or one from the system's randomness."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))

    def with_room(self, tokens: int) -> "SamplingParams":
        """Return these parameters with a `max_tokens` of at most `tokens`, and of 1 at least."""
        return replace(self, max_tokens=max(1, min(self.max_tokens, tokens)))

    def answers(self) -> tuple["SamplingParams", ...]:
        """Return the parameters of each answer, as a request of its own would have them: answer i has seed + i."""
        if self.seed is None:
            return (replace(self, n=1),) * self.n
        return tuple(replace(self, n=1, seed=(self.seed + answer) % (UINT64_MAX + 1)) for answer in range(self.n))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids of tokens that the model can never generate: they belong to another tokenizer.

        Args:
            vocab_size: rows of the model's embedding.

        Raises:
            InvalidArgumentError: an id of stop_token_ids or logit_bias is `vocab_size` or more.
        """
        for token_id in self.stop_token_ids:
            _check_whole("a stop token id", token_id, 0, vocab_size - 1)
        for token_id in self.logit_bias:
            _check_whole("a token id of logit_bias", token_id, 0, vocab_size - 1)

    @classmethod
    def from_proto(cls, message: generation_pb2.SamplingParams) -> "SamplingParams":
        """Read a message.

        Args:
            message: the message; fields that it does not set take the defaults.

        Returns:
            The parameters.

        Raises:
            InvalidArgumentError: a value is not allowed.
        """
        # Before they are copied: a message has room for millions.
        _check_count("stop", len(message.stop), "strings", MAX_STOP_STRINGS)
        _check_count("stop_token_ids", len(message.stop_token_ids), "ids", MAX_STOP_TOKENS)
        _check_count("logit_bias", len(message.logit_bias), "tokens", MAX_BIASED_TOKENS)
        _check_count("bad_words", len(message.bad_words), "strings", MAX_BAD_WORDS)
        given = {name: getattr(message, name) for name in OPTIONAL_FIELDS if message.HasField(name)}
        form = (
            StructuredOutput.from_proto(message.structured_output) if message.HasField("structured_output") else None
        )
        return cls(
            structured_output=form,
            stop=tuple(message.stop),
            stop_token_ids=frozenset(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
            logit_bias=dict(message.logit_bias),
            bad_words=tuple(message.bad_words),
            **given,
        )

    def to_proto(self) -> generation_pb2.SamplingParams:
        """Return a message with every field set, so that its reader's defaults do not matter.

        What is None stays unset: that is None in the message.
        """
        return generation_pb2.SamplingParams(
            structured_output=None if self.structured_output is None else self.structured_output.to_proto(),
            stop=self.stop,
            stop_token_ids=sorted(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logit_bias=self.logit_bias,
            bad_words=self.bad_words,
            **{name: getattr(self, name) for name in OPTIONAL_FIELDS},
        )


def _refusal(name: str, value: object, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is {quoted(value)}; allowed: {allowed}")


def _check_whole(name: str, value: object, minimum: int, maximum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise _refusal(name, value, f"a whole number from {minimum} to {maximum}")


def _check_number(name: str, value: object, minimum: float, maximum: float) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails every comparison, so it lies in no range.
    if not real or not minimum <= value <= maximum:  # type: ignore[operator]  # `real` says that it compares
        raise _refusal(name, value, f"a number from {minimum:g} to {maximum:g}")


def _check_count(name: str, count: int, of_what: str, maximum: int) -> None:
    if count > maximum:
        raise InvalidArgumentError(f"{name} has {count} {of_what}; allowed: at most {maximum}")


def _check_texts(name: str, texts: Iterable[object], maximum: int) -> None:
    if not isinstance(texts, tuple):
        raise _refusal(name, texts, "a tuple of strings")
    _check_count(name, len(texts), "strings", maximum)
    for place, string in enumerate(texts):
        if not isinstance(string, str) or not string:
            raise _refusal(f"{name}[{place}]", string, "a string of at least one character")
        if len(string) > MAX_TEXT_CHARACTERS:
            raise InvalidArgumentError(
                f"{name}[{place}] has {len(string)} characters; allowed: at most {MAX_TEXT_CHARACTERS}"
            )
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise _refusal(f"{name}[{place}]", string, "characters that UTF-8 can encode; lone surrogates are not")


def _check_stop_tokens(token_ids: Iterable[object]) -> None:
    if not isinstance(token_ids, frozenset):
        raise _refusal("stop_token_ids", token_ids, "a frozenset of token ids")
    _check_count("stop_token_ids", len(token_ids), "ids", MAX_STOP_TOKENS)
    for token_id in token_ids:
        _check_whole("a stop token id", token_id, 0, UINT32_MAX)


def _check_logit_bias(bias: Mapping[int, float]) -> None:
    if not isinstance(bias, Mapping):
        raise _refusal("logit_bias", bias, "numbers by token id")
    _check_count("logit_bias", len(bias), "tokens", MAX_BIASED_TOKENS)
    for token_id, value in bias.items():
        _check_whole("a token id of logit_bias", token_id, 0, UINT32_MAX)
        _check_number(f"logit_bias[{token_id}]", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
