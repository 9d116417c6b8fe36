"""Read requests for `/v1/chat/completions`."""

import reprlib
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, PrivateAttr, model_validator

from spectrumkv.client.request import Message, Sampling
from spectrumkv.client.tools import Tools
from spectrumkv.gateway.api.fields import (
    OPENAI,
    VLLM,
    Entries,
    FieldError,
    Ignored,
    Refused,
    RequestFields,
    Switch,
    Text,
    Whole,
    supported,
)
from spectrumkv.gateway.api.sampling import REFUSED, SamplingFields
from spectrumkv.gateway.api.tools import ToolCallFields, ToolChoice, ToolFields, read_tools

TEMPLATE_REASON = "messages are rendered by the model's own template; render yours, and send it to /v1/completions"


def _read_content(value: object) -> object:
    """Return the text of a message whose content may be given in parts.

    Raises:
        FieldError: a part is no text.
    """
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            said = reprlib.repr(kind)
            raise FieldError(f"content has a part of type {said}; allowed: text, the model reads no other")
        texts.append(part["text"])
    return "".join(texts)


class MessageFields(RequestFields):
    """Hold one message of a conversation."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "function_call": Refused(OPENAI, "it is called tool_calls now"),
        "audio": Refused(OPENAI, "the model reads text only"),
        "reasoning_content": Refused(VLLM, "reasoning is part of the content; leave it out", ("",)),
        "reasoning": Refused(VLLM, "reasoning is part of the content; leave it out", ("",)),
    }
    ignored: ClassVar[Mapping[str, Ignored]] = {
        "name": Ignored(OPENAI, "tells participants of one role apart; models' templates do not read it"),
        "refusal": Ignored(OPENAI, "what the provider's model declined to answer; part of its own answers"),
        "annotations": Ignored(OPENAI, "links of a web search; part of the provider's own answers"),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"] = supported(
        OPENAI, "`system`, `user`, `assistant` or `tool`; `developer` is `system`", ...
    )
    content: Annotated[Text | None, BeforeValidator(_read_content)] = supported(
        OPENAI, "a text, or a list of parts of type `text`; may be left out beside `tool_calls`"
    )
    tool_calls: Entries[ToolCallFields] | None = supported(OPENAI, "the calls that an assistant's message made")
    tool_call_id: Text | None = supported(OPENAI, "in a message of the role `tool`: which call it answers")

    @model_validator(mode="after")
    def _check_content(self) -> "MessageFields":
        if self.content is None and not self.tool_calls:
            raise FieldError("content is missing; it must be given", "content")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> "MessageFields":
        if self.tool_calls and self.role != "assistant":
            raise FieldError(
                f"tool_calls are in a message of the role {self.role}; only assistants call", "tool_calls"
            )
        if (self.tool_call_id is not None) != (self.role == "tool"):
            what = "is missing" if self.role == "tool" else f"is in a message of the role {self.role}"
            raise FieldError(f"tool_call_id {what}; messages of the role tool have it, others do not", "tool_call_id")
        return self

    def message(self) -> Message:
        """Return what the client sends."""
        role = "system" if self.role == "developer" else self.role
        calls = tuple(one.call() for one in self.tool_calls or ())
        return Message(role, self.content or "", calls, self.tool_call_id)


class ChatFields(SamplingFields):
    """Hold the body of `/v1/chat/completions`."""

    refused: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "best_of": Refused(OPENAI, "all answers are returned, none chosen; leave it out", (1,)),
        "parallel_tool_calls": Refused(OPENAI, "the model may call several; use the first of its calls", (True,)),
        "functions": Refused(OPENAI, "they are called tools now", ([],)),
        "function_call": Refused(OPENAI, "it is called tool_choice now", ("none", "auto")),
        "modalities": Refused(OPENAI, "answers are text", (["text"],)),
        "audio": Refused(OPENAI, "answers are text; leave it out"),
        "prediction": Refused(OPENAI, "an expected answer speeds nothing up here; leave it out"),
        "web_search_options": Refused(OPENAI, "the model searches nothing; leave it out"),
        "reasoning_effort": Refused(OPENAI, "the models here have no such setting; ask for it in a message"),
        "verbosity": Refused(OPENAI, "the models here have no such setting; ask for it in a message", ("medium",)),
        "include_reasoning": Refused(VLLM, "reasoning is part of the content; leave it out", (True,)),
        "echo": Refused(VLLM, "the answer does not repeat the last message; leave it out", (False,)),
        "add_generation_prompt": Refused(VLLM, TEMPLATE_REASON, (True,)),
        "continue_final_message": Refused(VLLM, TEMPLATE_REASON, (False,)),
        "chat_template": Refused(VLLM, TEMPLATE_REASON),
        "chat_template_kwargs": Refused(VLLM, TEMPLATE_REASON, ({},)),
        "documents": Refused(VLLM, "put documents into a message", ([],)),
        "mm_processor_kwargs": Refused(VLLM, "the model reads text only", ({},)),
    }

    messages: Entries[MessageFields] = supported(OPENAI, "the conversation; the model's own template renders it", ...)
    tools: Entries[ToolFields] | None = supported(OPENAI, "functions that the model may call")
    tool_choice: ToolChoice = supported(
        OPENAI,
        "`none`, `auto`, `required`, or an object that names a function: whether the model calls. Left out: `auto`",
    )
    max_completion_tokens: Whole | None = supported(
        OPENAI, "the most tokens of the answer. Left out: the server's default, 128 or what the context leaves"
    )
    max_tokens: Whole | None = supported(OPENAI, "the older name of `max_completion_tokens`")
    logprobs: Switch | None = supported(OPENAI, "the answer has the log-probabilities of its tokens")
    top_logprobs: Whole | None = supported(OPENAI, "and of so many likeliest tokens; only with `logprobs`")

    # Read once: tools may be megabytes of schemas.
    _offered_tools: Tools = PrivateAttr(default=Tools())

    @model_validator(mode="after")
    def _read_tools(self) -> "ChatFields":
        self._offered_tools = read_tools(self.tools, self.tool_choice)
        return self

    @property
    def offered_tools(self) -> Tools:
        """The functions that the model may call."""
        return self._offered_tools

    def prompt(self) -> tuple[Message, ...]:
        """Return the conversation as the client sends it."""
        return tuple(one.message() for one in self.messages)

    def sampling(self) -> Sampling:
        """Return how tokens are sampled.

        Raises:
            InvalidArgumentError: a value does not fit the services' messages.
        """
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling_with(most, (self.top_logprobs or 0) if self.logprobs else None)
