"""Turns token ids into text, one token at a time.

The pieces put together are the text that decoding all ids at once gives, as the continuation of a prompt.
"""

import re
from collections.abc import Container, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InternalError

# A single byte, as vocabularies with byte fallback (SentencePiece) write it.
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# The prompt's last tokens among which one with a text of its own is looked for.
TOKENS_LOOKED_AT = 64
# What an answer is decoded after where the prompt has no such token.
ANY_WORD = "a"


class Detokenizer:
    """Turns the generated tokens of one request into text.

    Text that `push` has returned stays as it is: all pieces and what `flush` returns together equal
    `tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`, and no piece splits
    a character. Special tokens, and ids that the tokenizer does not know, have no text.

    Decoders of SentencePiece take away the space before the first word of a text. An answer is no text of its own,
    and its space separates it from the prompt: it is decoded after a token of the prompt that has text.

    `tokenizers.decoders.DecodeStream` does this where text only grows at its end. Byte fallback is the exception: a
    run of byte tokens is text if all of it is valid UTF-8, and otherwise one U+FFFD per byte, so that a single bad
    byte changes the text of the bytes before it (and DecodeStream raises or differs from `decode`). Therefore such a
    run is held back until the token after it.

    Args:
        tokenizer: the model's tokenizer.
        prompt_token_ids: what the tokens continue; nothing where they are a text of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._before = _last_with_text(self._tokenizer, self._special, prompt_token_ids)
        if not self._before and self._decoded(prompt_token_ids).strip():
            # The prompt is single bytes and spaces. Any token with text does, since only being after one counts.
            word = self._tokenizer.encode(ANY_WORD, add_special_tokens=False).ids
            self._before = _last_with_text(self._tokenizer, self._special, word)
        self._text_before = self._decoded(self._before)
        self._stream = DecodeStream(ids=self._before, skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._bytes: list[int] = []
        self._returned = ""

    def push(self, token_id: int) -> str:
        """Take the next token.

        Args:
            token_id: the token.

        Returns:
            The text that is certain with this token, which may be empty.

        Raises:
            InternalError: this token changes text that was returned before.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return ""
        self._token_ids.append(token_id)
        self._bytes.append(token_id)
        if BYTE_TOKEN.fullmatch(token):
            return ""
        new, self._bytes = self._bytes, []
        try:
            text = self._stream.step(self._tokenizer, new) or ""
        except Exception as error:  # tokenizers raises nothing narrower
            raise InternalError(f"the tokenizer cannot decode token {token_id} ({token!r}) as it arrives") from error
        self._returned += text
        return text

    def flush(self) -> str:
        """Return the text that was not certain yet; an incomplete character becomes U+FFFD.

        Raises:
            InternalError: all tokens together have another text than the pieces that were returned.
        """
        text = self._decoded([*self._before, *self._token_ids]).removeprefix(self._text_before)
        if not text.startswith(self._returned):
            raise InternalError(
                f"the tokenizer decodes {len(self._token_ids)} tokens to another text than it gave one by one"
            )
        rest = text[len(self._returned) :]
        self._returned = text
        return rest

    def _decoded(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _last_with_text(tokenizer: Tokenizer, special: Container[int], prompt_token_ids: Sequence[int]) -> list[int]:
    """Return the last token of the prompt that has a text of its own; none where none of the last ones has."""
    for token_id in reversed(prompt_token_ids[-TOKENS_LOOKED_AT:]):
        token = tokenizer.id_to_token(token_id)
        if token is None or token_id in special or BYTE_TOKEN.fullmatch(token):
            continue
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        if text and "\ufffd" not in text:
            return [token_id]
    return []
