"""The tokenizer against SentencePiece's own way to merge, written out, on random text."""

from itertools import pairwise

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spectrumkv.bench.models.gemma.tokenizer import build_tokenizer
from tests.bench.models.gemma.gguf_files import KINDS, SCORES, TOKENS, USER_DEFINED, fields

IDS = {token: token_id for token_id, token in enumerate(TOKENS)}
NORMAL = {token for token, kind in zip(TOKENS, KINDS, strict=True) if kind == TokenType.NORMAL}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(fields())


def sentencepiece(text: str) -> list[int]:
    """Token ids as SentencePiece's `bpe_model.cc` finds them, without its queue."""
    symbols: list[tuple[str, bool]] = []
    while text:
        frozen = max((one for one in USER_DEFINED if text.startswith(one)), key=len, default="")
        symbols.append((frozen, True) if frozen else (text[0].replace(" ", "▁"), False))
        text = text[len(symbols[-1][0]) :]
    while True:
        pairs = [
            (-SCORES[IDS[left + right]], place)
            for place, ((left, kept), (right, also)) in enumerate(pairwise(symbols))
            if left + right in NORMAL and not kept and not also
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = [(symbols[place][0] + symbols[place + 1][0], False)]
    ids: list[int] = []
    for symbol, frozen in symbols:
        known = frozen or symbol in NORMAL
        ids += [IDS[symbol]] if known else [IDS[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


pieces = st.sampled_from(["the", " the", "and ", "ban", "ing", "\n", " ", "  ", "<b>", "é", "aéb", "世", "🙂", "x"])


@given(text=st.lists(pieces | st.text("thenigabd é\n<", max_size=4), max_size=20).map("".join))
def test_it_merges_as_sentencepiece_does(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == sentencepiece(text)
    assert tokenizer.decode(ids) == text


def test_pieces_are_merged_by_score_and_not_from_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    # "ent" has a higher score than "hen", which comes first.
    assert tokenizer.tokenize("hent") == ["h", "ent"]
    # What is defined is found before anything is merged, the longest first.
    assert tokenizer.tokenize("the\n\n\nb   a") == ["the", "\n\n", "\n", "b", "   ", "a"]
    assert tokenizer.tokenize("é世🙂") == ["é", "世", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


def test_texts_begin_with_the_token_that_gemma_was_trained_with(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("the").input_ids == [IDS["<bos>"], IDS["the"]]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<eos>", "<pad>", "<unk>")
    assert tokenizer.decode([2, IDS["the"], 1], skip_special_tokens=True) == "the"
    assert tokenizer.chat_template is None
