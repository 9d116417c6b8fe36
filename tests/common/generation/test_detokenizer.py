import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.errors import InternalError
from spectrumkv.common.generation.detokenizer import Detokenizer
from tests.common.generation.conftest import tokenizer_of
from tests.common.generation.tokenizers_for_tests import KINDS

TRICKY = "naïve café — 日本語テキスト 👩‍👩‍👧‍👦 🇩🇪 ا ل ع ر ب ي ة ก็ e\u0301 \ufffd \U0010ffff\n\n  two  spaces\t"


def decoded(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def pieces_of(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", [*KINDS, "embedded"])
@given(data=st.data())
def test_pieces_together_are_what_decoding_everything_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    # The lowest ids are special tokens and single bytes; a few lie beyond the tokenizer, as in padded vocabularies.
    ids = st.integers(0, 300) | st.integers(0, len(tokenizer) + 5)
    token_ids = data.draw(st.lists(ids, max_size=40))
    assert "".join(pieces_of(tokenizer, token_ids)) == decoded(tokenizer, token_ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "embedded"])
@given(text=st.text(st.sampled_from(TRICKY), max_size=20))
def test_text_comes_back_and_no_piece_splits_a_character(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == decoded(tokenizer, token_ids) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@pytest.mark.parametrize("kind", [*KINDS, "embedded"])
@given(text=st.text(st.sampled_from("ab the.中é <\n"), min_size=2, max_size=20), data=st.data())
def test_an_answer_continues_its_prompt(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt = token_ids[:cut]
    assume("\ufffd" not in decoded(tokenizer, prompt) and decoded(tokenizer, prompt).strip())
    # What has no text of its own, at the prompt's end or alone, changes nothing.
    silent = data.draw(st.sampled_from([[], tokenizer.convert_tokens_to_ids(["<s>"]), [len(tokenizer) + 5]]))
    detokenizer = Detokenizer(tokenizer, [*prompt, *silent])
    answer = "".join([*map(detokenizer.push, token_ids[cut:]), detokenizer.flush()])
    assert decoded(tokenizer, prompt) + answer == decoded(tokenizer, token_ids)


def test_a_character_appears_with_its_last_token(byte_level: PreTrainedTokenizerFast) -> None:
    token_ids = byte_level("a👩é中", add_special_tokens=False).input_ids
    assert pieces_of(byte_level, token_ids) == ["a", "", "", "", "👩", "", "é", "", "", "中", ""]


def test_an_incomplete_character_ends_as_a_replacement_character(byte_level: PreTrainedTokenizerFast) -> None:
    token_ids = byte_level("ab👩", add_special_tokens=False).input_ids[:-1]
    assert pieces_of(byte_level, token_ids) == ["ab", "", "", "", "\ufffd"]


def test_bytes_are_held_back_until_it_is_certain_what_they_are(byte_fallback: PreTrainedTokenizerFast) -> None:
    first, second = "<0xC3>", "<0xA9>"
    letter, bad, plain = "<0x48>", "<0xFF>", "a"
    ids = byte_fallback.convert_tokens_to_ids
    assert pieces_of(byte_fallback, ids([letter, first, second, plain])) == ["", "", "", "Héa", ""]
    # One bad byte makes every byte of its run bad: had "H" been returned at once, it would have to be taken back.
    assert pieces_of(byte_fallback, ids([letter, bad, plain])) == ["", "", "��a", ""]
    assert pieces_of(byte_fallback, ids([letter, bad])) == ["", "", "��"]
    # A special token has no text and does not end the run.
    assert pieces_of(byte_fallback, ids([first, "</s>", second, plain])) == ["", "", "", "éa", ""]


def test_bytes_are_why_decode_stream_alone_does_not_do(byte_fallback: PreTrainedTokenizerFast) -> None:
    """Once this fails, holding back byte tokens can go."""
    token_ids = byte_fallback.convert_tokens_to_ids(["<0x48>", "<0xFF>", "a"])
    stream = DecodeStream(skip_special_tokens=True)
    backend = byte_fallback.backend_tokenizer
    assert stream.step(backend, token_ids[0]) == "H"
    assert stream.step(backend, token_ids[1]) is None
    with pytest.raises(Exception, match="Invalid prefix encountered"):
        stream.step(backend, token_ids[2])


def test_a_leading_space_is_where_decoding_the_whole_has_it(byte_fallback: PreTrainedTokenizerFast) -> None:
    ids = byte_fallback.convert_tokens_to_ids
    assert pieces_of(byte_fallback, ids(["▁a", "b", "▁the"])) == ["a", "b", " the", ""]
    assert pieces_of(byte_fallback, ids(["▁", "▁a", "▁", "▁a"])) == ["", " a", " ", " a", ""]


def test_special_tokens_have_no_text_and_other_added_tokens_do(tokenizer: PreTrainedTokenizerFast) -> None:
    added = tokenizer.added_tokens_decoder.items()
    for token_id, token in added:
        assert "".join(pieces_of(tokenizer, [token_id])) == ("" if token.special else token.content)
    assert any(token.special for _, token in added)


def test_a_long_answer_takes_time_in_proportion(embedded: PreTrainedTokenizerFast) -> None:
    """DecodeStream looks at the tokens since its last text but one: text must come every few tokens."""
    token_ids = embedded(TRICKY * 60).input_ids
    assert len(token_ids) > 2000
    detokenizer = Detokenizer(embedded)
    silent = longest = 0
    for token_id in token_ids:
        silent = 0 if detokenizer.push(token_id) else silent + 1
        longest = max(longest, silent)
    assert longest < 10


def test_a_decoder_that_takes_text_back_is_an_error_and_not_wrong_text() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    # Joins tokens and then turns "ab" into "c".
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "cde")])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert detokenizer.push(0) == "a"
    with pytest.raises(InternalError, match="cannot decode token 1 \\('b'\\) as it arrives"):
        detokenizer.push(1)
    with pytest.raises(InternalError, match="decodes 2 tokens to another text"):
        detokenizer.flush()
