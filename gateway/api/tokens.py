"""Read requests for `/tokenize` and `/detokenize`, which vLLM has."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import model_validator

from spectrumkv.client.request import Request
from spectrumkv.client.tools import Tools
from spectrumkv.gateway.api.chat import TEMPLATE_REASON, MessageFields
from spectrumkv.gateway.api.fields import (
    VLLM,
    Entries,
    FieldError,
    Refused,
    RequestFields,
    Switch,
    Text,
    Whole,
    supported,
)
from spectrumkv.gateway.api.tools import ToolFields


class TokenizeFields(RequestFields):
    """Hold the body of `/tokenize`."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "add_special_tokens": Refused(VLLM, "the prompt is tokenized as /v1/completions does it", (True,)),
        "add_generation_prompt": Refused(VLLM, TEMPLATE_REASON, (True,)),
        "continue_final_message": Refused(VLLM, TEMPLATE_REASON, (False,)),
        "chat_template": Refused(VLLM, TEMPLATE_REASON),
        "chat_template_kwargs": Refused(VLLM, TEMPLATE_REASON, ({},)),
        "mm_processor_kwargs": Refused(VLLM, "the model reads text only", ({},)),
    }

    model: Text | None = supported(VLLM, "must be the served model")
    prompt: Text | None = supported(VLLM, "a text, tokenized as `/v1/completions` does it")
    messages: Entries[MessageFields] | None = supported(VLLM, "or a conversation, as `/v1/chat/completions` reads it")
    tools: Entries[ToolFields] | None = supported(VLLM, "functions that the model is shown; only with `messages`")
    return_token_strs: Switch | None = supported(VLLM, "the answer has the text of each token as `token_strs`")

    @model_validator(mode="after")
    def _have_one_prompt(self) -> "TokenizeFields":
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt and messages are both given or both missing; give one of them", "prompt")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> "TokenizeFields":
        if self.tools and self.messages is None:
            raise FieldError("tools are given with prompt; they need messages", "tools")
        return self

    def request(self) -> Request:
        """Return the prompt and its tools as the client sends them."""
        tools = Tools(tuple(one.tool() for one in self.tools or ()))
        messages = tuple(one.message() for one in self.messages or ())
        return Request(prompt=messages if self.prompt is None else self.prompt, model=self.model, tools=tools)


class DetokenizeFields(RequestFields):
    """Hold the body of `/detokenize`."""

    model: Text | None = supported(VLLM, "must be the served model")
    tokens: Entries[Whole] = supported(VLLM, "token ids", ...)
