"""Turns the prompt of a request into the token ids that the model reads.

A prompt that cannot fit into the model's context is refused before the work that would show it: bytes and messages
are bounded first, and the tokens of a long text are counted piece by piece.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InternalError, InvalidArgumentError, quoted
from spectrumkv.common.generation.control_tokens import ControlTokens, MarkedText
from spectrumkv.common.generation.conversation import Turn, check_roles, template_tools, turns, turns_in_text
from spectrumkv.common.generation.detokenizer import ANY_WORD
from spectrumkv.v1 import prefill_pb2

# A text of so many characters is tokenized at once, a longer one after its tokens were counted in such pieces.
PIECE_CHARACTERS = 16 << 10
# A chat message takes so many bytes besides its content; a token id of a prompt that is sent as such takes fewer.
BYTES_PER_MESSAGE = 32
# A text cut into pieces may have a few tokens more for each cut.
TOKENS_PER_CUT = 16


class PromptReader:
    """Turns prompts into token ids, with work and memory bounded by the model's context.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: rows of the model's embedding; ids are less than this.
        context_length: length of the model's context in tokens.
        allow_control_tokens: whether control tokens in the content of chat messages act as such; otherwise they are
            text like any other.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        context_length: int,
        allow_control_tokens: bool = False,
    ) -> None:
        self._control_tokens = None if allow_control_tokens else ControlTokens(tokenizer)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length
        # No text that fits has more bytes. UTF-8 of a token is at least as long as what the token stands for.
        # Decoders of SentencePiece take away the space before the first token of a text.
        self._word: list[int] = tokenizer(ANY_WORD, add_special_tokens=False).input_ids
        self._word_text = self._decoded(self._word)
        self._max_bytes = context_length * max(len(token.encode()) for token in tokenizer.get_vocab())

    @property
    def most_bytes(self) -> int:
        """The most bytes that a prompt that fits can take in a message, whichever kind it is of."""
        return self._max_bytes + self._context_length * BYTES_PER_MESSAGE

    def read(self, request: prefill_pb2.GenerateRequest, check: Callable[[], None] = lambda: None) -> list[int]:
        """Turn a request's prompt into token ids.

        Text is tokenized as it is, with the special tokens that the tokenizer adds by itself. Chat messages are
        rendered with the model's own template up to the start of the assistant's answer; control tokens in their
        content are text, unless they are allowed. Token ids are used as they are.

        Args:
            request: the request, of which `prompt` is read.
            check: called between pieces of the work; raises an error where nobody waits for the prompt any more.

        Returns:
            The token ids, at least one.

        Raises:
            InvalidArgumentError: the request has no prompt, one that the model cannot read, or one that is longer
                than the model's context for certain; `check_length` compares exactly.
            InternalError: the tokenizer gave an id that the model does not have.
        """
        kind = request.WhichOneof("prompt")
        if kind == "text":
            token_ids = self._read_text(request.text, check)
        elif kind == "chat":
            token_ids = self._read_chat(request.chat, check)
        elif kind == "token_ids":
            return self._read_token_ids(request.token_ids.ids)
        else:
            raise InvalidArgumentError("the request has no prompt; set one of text, chat and token_ids")
        if not token_ids:
            raise InvalidArgumentError("the prompt has no tokens; a prompt has at least one")
        # On a GPU an id beyond the embedding would end the process, not just the request.
        if max(token_ids) >= self._vocab_size:
            raise InternalError(
                f"the tokenizer gave token id {max(token_ids)}, but the model's vocabulary has {self._vocab_size}; "
                "the tokenizer belongs to another model"
            )
        return token_ids

    def text_of(self, token_ids: Sequence[int]) -> tuple[str, list[str]]:
        """Turn token ids into text.

        Args:
            token_ids: any of the model's, special ones among them; none at all have no text.

        Returns:
            The text of all tokens together, and the text of each token by itself, as it stands after another word. A
            token with a part of a character has U+FFFD for it.

        Raises:
            InvalidArgumentError: there are more ids than the context holds, or the model does not have one of them.
        """
        ids = self._read_token_ids(token_ids) if token_ids else []
        return self._decoded(ids), [self._decoded([*self._word, one]).removeprefix(self._word_text) for one in ids]

    def _decoded(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _read_text(self, text: str, check: Callable[[], None]) -> list[int]:
        # A tokenizer that starts every text with a token of its own would make a prompt out of nothing.
        if not text:
            raise InvalidArgumentError("the prompt's text is empty; a prompt has at least one token")
        return self._tokenize(text, check, add_special_tokens=True)

    def _read_chat(self, chat: prefill_pb2.ChatMessages, check: Callable[[], None]) -> list[int]:
        messages = chat.messages
        if not messages:
            raise InvalidArgumentError("chat has no messages; send one at least")
        if len(messages) > self._context_length:
            raise InvalidArgumentError(
                f"chat has {len(messages)} messages; the model's context holds {self._context_length} tokens: send "
                "fewer messages"
            )
        check_roles(messages)
        if not self._tokenizer.chat_template:
            raise InvalidArgumentError(
                "this model has no chat template; send the prompt as text or token_ids instead"
            )
        contents = [message.content for message in messages]
        self._check_bytes([*contents, *_tool_texts(chat)])
        tools = template_tools(chat)
        control = self._control_tokens
        if control is not None:
            _refuse_control_tokens(control, chat)
        roles = [message.role for message in messages]

        def render(contents: Sequence[str]) -> str:
            return self._rendered(turns(messages, contents), tools)

        if control is None:
            return self._tokenize(render(contents), check, add_special_tokens=False)
        marked = _marked(control, roles, contents, render)
        self._check_size(marked.text, check)
        harmless = control.harmless(roles, contents)
        if harmless != contents and control.acting(marked) != control.acting(
            _marked(control, roles, harmless, render)
        ):
            raise InvalidArgumentError(
                "the model's chat template makes control tokens of these messages' text; leave out what looks like "
                "one, or start the server with --allow-control-tokens"
            )
        return control.tokenize(marked)

    def _rendered(self, conversation: list[Turn], tools: list[dict[str, Any]]) -> str:
        """Return the text that the model's template makes of a conversation and tools.

        Raises:
            InvalidArgumentError: the template refuses the messages, or fails.
        """
        if "tools" not in str(self._tokenizer.chat_template):
            conversation, tools = turns_in_text(conversation, tools), []
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                conversation, tools=tools or None, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise InvalidArgumentError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:
            # A template is a program of the model's makers, and fails like one.
            raise InvalidArgumentError(
                f"the model's chat template fails on these messages ({type(error).__name__}: {error}); send the "
                "prompt as text or token_ids instead"
            ) from error
        return rendered

    def _read_token_ids(self, token_ids: Sequence[int]) -> list[int]:
        if not token_ids:
            raise InvalidArgumentError("token_ids is empty; a prompt has at least one token")
        if len(token_ids) > self._context_length:
            raise self._too_long(f"{len(token_ids)} tokens")
        for place, token_id in enumerate(token_ids):
            if token_id >= self._vocab_size:
                raise InvalidArgumentError(
                    f"token_ids[{place}] is {token_id}; allowed: 0 to {self._vocab_size - 1}, the model's vocabulary"
                )
        return list(token_ids)

    def _tokenize(self, text: str, check: Callable[[], None], add_special_tokens: bool) -> list[int]:
        """Return the text's tokens, unless there are more than the context holds for certain."""
        self._check_size(text, check)
        # `verbose` would warn about long texts; `check_length` refuses them.
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return token_ids

    def _check_size(self, text: str, check: Callable[[], None]) -> None:
        """Refuse a text that has more tokens than the context holds for certain, before it is tokenized."""
        self._check_bytes([text])
        if len(text) > PIECE_CHARACTERS:
            self._check_tokens(text, check)

    def _check_bytes(self, texts: Sequence[str]) -> None:
        """Refuse texts that have more bytes than all tokens of the context could have."""
        size = sum(len(text.encode()) for text in texts)
        if size > self._max_bytes:
            raise self._too_long(f"{size} bytes, where no text that fits has more than {self._max_bytes}")

    def _check_tokens(self, text: str, check: Callable[[], None]) -> None:
        """Refuse a text whose pieces have clearly more tokens than the context, at the piece that shows it."""
        tokens, allowed = 0, self._context_length
        for piece in _pieces(text):
            check()
            tokens += len(self._tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
            allowed += TOKENS_PER_CUT
            if tokens > allowed:
                raise self._too_long(f"more than {self._context_length} tokens")
        check()

    def _too_long(self, size: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the prompt has {size}; the model's context holds {self._context_length} tokens: shorten the prompt"
        )


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


def _tool_texts(chat: prefill_pb2.ChatMessages) -> list[str]:
    """Return what the tools and their calls add to the prompt."""
    tools = [f"{tool.name} {tool.description} {tool.parameters}" for tool in chat.tools]
    calls = [f"{call.id} {call.name} {call.arguments}" for one in chat.messages for call in one.tool_calls]
    return [*tools, *calls, *(message.tool_call_id for message in chat.messages)]


def _marked(
    control: ControlTokens, roles: Sequence[str], contents: Sequence[str], render: Callable[[Sequence[str]], str]
) -> MarkedText:
    """Return what the template makes of messages, with the control tokens of their contents marked."""
    marks, marked_contents = control.mark(roles, contents)
    return MarkedText.parse(render(marked_contents), marks)


def _refuse_control_tokens(control: ControlTokens, chat: prefill_pb2.ChatMessages) -> None:
    """Refuse tools and calls whose texts have control tokens, which templates would write as such.

    Raises:
        InvalidArgumentError: one has a control token.
    """
    for text in _tool_texts(chat):
        if control.acting(MarkedText(text)):
            raise InvalidArgumentError(
                f"a tool or a tool call has a control token of the model in {quoted(text)}; leave it out"
            )


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces of at most `PIECE_CHARACTERS`, cut before a space where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            space = text.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        yield text[start:end]
        start = end
