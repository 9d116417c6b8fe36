"""Turns the prompt of a request into the token ids that the model reads."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InternalError, InvalidArgumentError
from spectrumkv.v1 import prefill_pb2

ROLES = ("system", "user", "assistant")


def read_prompt(
    request: prefill_pb2.GenerateRequest, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> list[int]:
    """Turn a request's prompt into token ids.

    Text is tokenized as it is, with the special tokens that the tokenizer adds by itself. Chat messages are rendered
    with the model's own template up to the start of the assistant's answer. Token ids are used as they are.

    Args:
        request: the request, of which `prompt` is read.
        tokenizer: the model's tokenizer.
        vocab_size: rows of the model's embedding; ids are less than this.

    Returns:
        The token ids, at least one.

    Raises:
        InvalidArgumentError: the request has no prompt, or one that the model cannot read.
        InternalError: the tokenizer gave an id that the model does not have.
    """
    kind = request.WhichOneof("prompt")
    if kind == "text":
        token_ids = _read_text(request.text, tokenizer)
    elif kind == "chat":
        token_ids = _read_chat(request.chat.messages, tokenizer)
    elif kind == "token_ids":
        return _read_token_ids(request.token_ids.ids, vocab_size)
    else:
        raise InvalidArgumentError("the request has no prompt; set one of text, chat and token_ids")
    if not token_ids:
        raise InvalidArgumentError("the prompt has no tokens; a prompt has at least one")
    # On a GPU an id beyond the embedding would end the process, not just the request.
    if max(token_ids) >= vocab_size:
        raise InternalError(
            f"the tokenizer gave token id {max(token_ids)}, but the model's vocabulary has {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return token_ids


def check_length(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Refuse a request whose prompt and completion are longer than the model's context.

    Args:
        prompt_tokens: length of the prompt in tokens.
        max_tokens: the most tokens to generate.
        context_length: length of the model's context in tokens.

    Raises:
        InvalidArgumentError: prompt and completion together are longer than the context.
    """
    if prompt_tokens + max_tokens <= context_length:
        return
    if prompt_tokens >= context_length:
        remedy = f"shorten the prompt by {prompt_tokens + max_tokens - context_length} tokens or more"
        if max_tokens > 1:
            remedy = f"the prompt alone leaves no room for an answer: {remedy}, fewer with a lower max_tokens"
    else:
        remedy = f"set max_tokens to {context_length - prompt_tokens} or less"
        if max_tokens < context_length:
            remedy += f", or shorten the prompt to {context_length - max_tokens} tokens or less"
    raise InvalidArgumentError(
        f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
        f"{prompt_tokens + max_tokens}; the model's context holds {context_length}: {remedy}"
    )


def _read_text(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    # A tokenizer that starts every text with a token of its own would make a prompt out of nothing.
    if not text:
        raise InvalidArgumentError("the prompt's text is empty; a prompt has at least one token")
    # `verbose` would warn about long texts; `check_length` refuses them.
    token_ids: list[int] = tokenizer(text, verbose=False).input_ids
    return token_ids


def _read_chat(messages: Sequence[prefill_pb2.ChatMessage], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    if not messages:
        raise InvalidArgumentError("chat has no messages; send one at least")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgumentError(
                f"chat message {place} has the role {message.role!r}; allowed: {', '.join(ROLES)}"
            )
    if not tokenizer.chat_template:
        raise InvalidArgumentError("this model has no chat template; send the prompt as text or token_ids instead")
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        # The template writes the special tokens itself.
        token_ids: list[int] = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise InvalidArgumentError(f"the model's chat template refuses these messages: {error}") from error
    return token_ids


def _read_token_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    if not token_ids:
        raise InvalidArgumentError("token_ids is empty; a prompt has at least one token")
    for place, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise InvalidArgumentError(
                f"token_ids[{place}] is {token_id}; allowed: 0 to {vocab_size - 1}, the model's vocabulary"
            )
    return list(token_ids)
