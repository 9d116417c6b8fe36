"""Read requests for `/tokenize` and `/detokenize`, which vLLM has."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import model_validator

from spectrumkv.client.request import Prompt
from spectrumkv.gateway.api.chat import TEMPLATE_REASON, MessageFields
from spectrumkv.gateway.api.fields import (
    VLLM,
    FieldError,
    Refused,
    RequestFields,
    Switch,
    Text,
    Whole,
    supported,
)


class TokenizeFields(RequestFields):
    """Hold the body of `/tokenize`."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "add_special_tokens": Refused(VLLM, "the prompt is tokenized as /v1/completions does it", (True,)),
        "add_generation_prompt": Refused(VLLM, TEMPLATE_REASON, (True,)),
        "continue_final_message": Refused(VLLM, TEMPLATE_REASON, (False,)),
        "chat_template": Refused(VLLM, TEMPLATE_REASON),
        "chat_template_kwargs": Refused(VLLM, TEMPLATE_REASON, ({},)),
        "mm_processor_kwargs": Refused(VLLM, "the model reads text only", ({},)),
        "tools": Refused(VLLM, "tools are not supported; describe them in a message", ([],)),
    }

    model: Text | None = supported(VLLM, "must be the served model")
    prompt: Text | None = supported(VLLM, "a text, tokenized as `/v1/completions` does it")
    messages: list[MessageFields] | None = supported(VLLM, "or a conversation, as `/v1/chat/completions` reads it")
    return_token_strs: Switch | None = supported(VLLM, "the answer has the text of each token as `token_strs`")

    @model_validator(mode="after")
    def _have_one_prompt(self) -> "TokenizeFields":
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt and messages are both given or both missing; give one of them", "prompt")
        return self

    def text(self) -> Prompt:
        """Return the prompt as the client sends it."""
        return self.prompt if self.prompt is not None else tuple(one.message() for one in self.messages or ())


class DetokenizeFields(RequestFields):
    """Hold the body of `/detokenize`."""

    model: Text | None = supported(VLLM, "must be the served model")
    tokens: list[Whole] = supported(VLLM, "token ids", ...)
