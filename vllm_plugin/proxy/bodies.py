"""What a client asks, what the proxy makes of it for prefill and decode, and what prefill answers."""

from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError

Body = dict[str, Any]
# vLLM's own default for completions.
DEFAULT_MAX_TOKENS = 16
# The field that says how many tokens may be generated, and its older name.
_LIMITS = ("max_completion_tokens", "max_tokens")
# With one of these the answer depends on its first token in a way that a prompt with that token appended would lose:
# penalties and grammars look at generated tokens only, and texts to stop at may begin in the first token.
_NEED_WHOLE_ANSWER = (
    "echo", "best_of", "prompt_logprobs", "use_beam_search", "presence_penalty", "frequency_penalty", "min_tokens",
    "stop", "response_format", "structured_outputs", "tools", "tool_choice", "functions", "logits_processors",
    "reasoning_effort", "include_reasoning", "allowed_token_ids", "bad_words", "suffix",
)  # fmt: skip
# What a chat request may say that a completion with the same prompt can be asked for.
_SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "logit_bias", "stream", "stream_options", "priority", "cache_salt", "user", "request_id",
)  # fmt: skip


@dataclass(frozen=True)
class ClientRequest:
    """A request as a client sent it.

    Attributes:
        body: its JSON.
        is_chat: whether it came to `/v1/chat/completions`.
    """

    body: Body
    is_chat: bool

    def __post_init__(self) -> None:
        if not isinstance(self.body, dict):
            raise InvalidArgumentError("the request's body is no JSON object")
        prompt = self.body.get("prompt")
        is_batch = isinstance(prompt, list) and any(isinstance(one, list | str) for one in prompt)
        if is_batch or (not self.is_chat and not prompt):
            raise InvalidArgumentError("prompt is missing or holds several prompts; send one prompt in each request")
        for name in (*_LIMITS, "n"):
            value = self.body.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidArgumentError(f"{name} is {value!r}; allowed: a whole number from 1")

    @property
    def path(self) -> str:
        """Return the path that it came to."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    @property
    def completions(self) -> int:
        """Return how many completions are asked for."""
        return int(self.body.get("n") or 1)

    @property
    def streams(self) -> bool:
        """Return whether tokens are wanted as they come."""
        return bool(self.body.get("stream"))

    @property
    def max_tokens(self) -> int | None:
        """Return how many tokens may be generated; None where vLLM decides."""
        given = next((self.body[name] for name in _LIMITS if self.body.get(name) is not None), None)
        return DEFAULT_MAX_TOKENS if given is None and not self.is_chat else given

    @property
    def wants_usage(self) -> bool:
        """Return whether a stream is to end with its usage."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def appends_first_token(self) -> bool:
        """Return whether decode may go on from prefill's first token as if it were the prompt's last one."""
        whole = any(self.body.get(name) not in (None, False, 0, "", [], {}) for name in _NEED_WHOLE_ANSWER)
        repetition = self.body.get("repetition_penalty")
        needs_more = self.completions > 1 or repetition not in (None, 1, 1.0)
        return not (whole or needs_more or (self.is_chat and self.body.get("logprobs")))

    def for_prefill(self, transfer_id: str) -> Body:
        """Return the body for prefill, which computes the prompt and the first token.

        Args:
            transfer_id: names the transfer of its KV.
        """
        # An answer of one token would violate its least length.
        left_out = ("stream", "stream_options", "n", "min_tokens", "best_of", *_LIMITS)
        body = {name: value for name, value in self.body.items() if name not in left_out}
        wanted = dict(self.body.get("kv_transfer_params") or {})
        if self.max_tokens != 1:
            wanted |= {"do_remote_decode": True, "transfer_id": transfer_id, "fetches": self.completions}
        limit = "max_completion_tokens" if self.is_chat else "max_tokens"
        return body | {limit: 1, "return_token_ids": True, "kv_transfer_params": wanted}

    def for_decode(self, transfer: Body | None) -> Body:
        """Return the body for decode where it generates the first token, too.

        Args:
            transfer: prefill's `kv_transfer_params`; None has decode compute the prompt.
        """
        body = {name: value for name, value in self.body.items() if name != "kv_transfer_params"}
        return body if transfer is None else body | {"kv_transfer_params": transfer}

    def continuing(self, first: "PrefillAnswer") -> Body:
        """Return the body for decode where it goes on from the first token; it is one for `/v1/completions`.

        Args:
            first: prefill's.
        """
        names = _SAMPLING if self.is_chat else tuple(name for name in self.body if name not in ("prompt", *_LIMITS))
        body = {name: self.body[name] for name in names if name in self.body}
        # A completion without a limit ends after 16 tokens, and a chat where the context ends.
        room = first.most_tokens - len(first.prompt_token_ids) - 1
        left = room if self.max_tokens is None else self.max_tokens - 1
        prompt = [*first.prompt_token_ids, first.token_id]
        return body | {"max_tokens": left, "prompt": prompt, "kv_transfer_params": first.transfer}


@dataclass(frozen=True)
class PrefillAnswer:
    """What prefill answered.

    Attributes:
        answer: its JSON.
        prompt_token_ids: of the prompt.
        token_id: of the first token.
        text: of the first token.
        finish_reason: "stop" where the answer ends with it.
        transfer: `kv_transfer_params` for decode; None where nothing is handed out.
        most_tokens: of prompt and completion together.
    """

    answer: Body
    prompt_token_ids: list[int]
    token_id: int
    text: str
    finish_reason: str | None
    transfer: Body | None
    most_tokens: int

    @classmethod
    def of(cls, answer: Body, most_tokens: int) -> "PrefillAnswer":
        """Read prefill's answer.

        Args:
            answer: its JSON.
            most_tokens: of prompt and completion together.

        Returns:
            The first token, and what decode needs to go on.

        Raises:
            KeyError: it has not what was asked for.
            IndexError: it has no choice or no token.
        """
        choice = answer["choices"][0]
        message = choice.get("message")
        ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids") or []
        return cls(
            answer=answer,
            prompt_token_ids=list(ids),
            token_id=choice["token_ids"][0],
            text=choice["text"] if message is None else (message.get("content") or ""),
            finish_reason=choice.get("finish_reason"),
            transfer=answer.get("kv_transfer_params"),
            most_tokens=most_tokens,
        )

    @property
    def is_whole_text(self) -> bool:
        """Return whether the token is some characters, and not a part of one."""
        return bool(self.text) and "\ufffd" not in self.text
