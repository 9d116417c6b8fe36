from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.text import FinishReason, TextDelta, TextStream
from spectrumkv.v1 import generation_pb2
from tests.common.generation.conftest import tokenizer_of
from tests.common.generation.tokenizers_for_tests import KINDS

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def run(
    tokenizer: PreTrainedTokenizerFast,
    token_ids: Sequence[int],
    params: SamplingParams,
    eos: frozenset[int] = frozenset(),
) -> list[TextDelta]:
    """Deltas up to the last token or, if generation is not over by then, the flush as one more."""
    stream, deltas = TextStream(tokenizer, params, eos), []
    for token_id in token_ids:
        deltas.append(stream.push(token_id))
        if deltas[-1].finish:
            assert stream.flush() == ""
            return deltas
    return [*deltas, TextDelta(stream.flush())]


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize("kind", [*KINDS, "embedded"])
@given(data=st.data())
def test_deltas_are_the_decoded_tokens_up_to_the_end(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = st.integers(0, 300) | st.integers(0, len(tokenizer) - 1)
    token_ids = data.draw(st.lists(ids, min_size=1, max_size=30))
    eos = data.draw(st.frozensets(st.sampled_from(token_ids), max_size=2))
    also = data.draw(st.frozensets(st.sampled_from(token_ids), max_size=1))
    ignore = data.draw(st.booleans())
    most = data.draw(st.integers(1, 40))
    params = SamplingParams(max_tokens=most, stop_token_ids=also, ignore_eos=ignore)

    ends = also if ignore else also | eos
    last = next((place for place, token_id in enumerate(token_ids) if token_id in ends), None)
    deltas = run(tokenizer, token_ids, params, eos)
    if last is not None and last < most:
        expected, finish, number = token_ids[:last], STOP, last + 1
    elif most <= len(token_ids):
        expected, finish, number = token_ids[:most], LENGTH, most
    else:
        expected, finish, number = token_ids, None, len(token_ids) + 1
    assert text_of(deltas) == tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert deltas[-1].finish == finish
    assert len(deltas) == number


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "embedded"])
@given(data=st.data())
def test_text_ends_before_a_stop_string_wherever_tokens_are_cut(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    text = data.draw(st.text(st.sampled_from("abthe 中👩\n"), min_size=1, max_size=25))
    token_ids = ids_of(tokenizer, text)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    deltas = run(tokenizer, token_ids, SamplingParams(stop=(stop,), max_tokens=len(token_ids)))
    assert text_of(deltas) == text[: text.index(stop)]
    assert deltas[-1].finish == STOP


@given(data=st.data())
def test_a_replayed_stream_says_the_same(data: st.DataObject) -> None:
    tokenizer = tokenizer_of("embedded")
    token_ids = data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=20))
    params = SamplingParams(max_tokens=15, stop=("!", "the", "\n"))
    prefill, decode = (TextStream(tokenizer, params, frozenset({2})) for _ in range(2))
    for token_id in token_ids:
        delta = prefill.push(token_id)
        assert decode.push(token_id) == delta
        if delta.finish:
            return
    assert prefill.flush() == decode.flush()


def test_a_stop_string_inside_and_at_the_start_of_a_token(embedded: PreTrainedTokenizerFast) -> None:
    tokens = ids_of(embedded, "Hello wonderful world")
    assert len(tokens) == 3
    assert run(embedded, tokens, SamplingParams(stop=("nder",))) == [
        TextDelta("Hello"),
        TextDelta(" wo", STOP),
    ]
    assert run(embedded, tokens, SamplingParams(stop=("H",))) == [TextDelta("", STOP)]
    assert run(embedded, tokens, SamplingParams(stop=("lo w",))) == [TextDelta("Hel"), TextDelta("", STOP)]


def test_what_may_be_a_stop_string_waits_and_is_released(embedded: PreTrainedTokenizerFast) -> None:
    tokens = ids_of(embedded, "Hello wonderful world")
    params = SamplingParams(stop=("lo wonder!", "worlds"))
    assert run(embedded, tokens, params) == [
        TextDelta("Hel"),
        TextDelta("lo wonderfu"),
        TextDelta("l "),
        TextDelta("world"),
    ]
    assert run(embedded, [*tokens, 2], params, frozenset({2}))[-1] == TextDelta("world", STOP)
    assert run(embedded, tokens, SamplingParams(stop=("worlds",), max_tokens=3))[-1] == TextDelta(" world", LENGTH)


def test_the_last_token_allowed_may_also_be_a_stop(embedded: PreTrainedTokenizerFast) -> None:
    tokens = ids_of(embedded, "Hello wonderful world")
    params = SamplingParams(max_tokens=3, stop=("world",), stop_token_ids=frozenset({tokens[1]}))
    assert run(embedded, tokens, params)[-1] == TextDelta("", STOP)
    assert run(embedded, tokens, SamplingParams(max_tokens=3, stop=("world",)))[-1] == TextDelta(" ", STOP)
    assert run(embedded, [2], SamplingParams(max_tokens=1), frozenset({2})) == [TextDelta("", STOP)]


def test_a_stop_string_among_bytes_that_were_held_back(byte_fallback: PreTrainedTokenizerFast) -> None:
    tokens = byte_fallback.convert_tokens_to_ids(["a", "<0x48>", "<0x49>"])
    params = SamplingParams(stop=("H",), max_tokens=3)
    assert run(byte_fallback, tokens, params) == [TextDelta("a"), TextDelta(""), TextDelta("", STOP)]


def test_the_end_of_sequence_is_ignored_on_request(embedded: PreTrainedTokenizerFast) -> None:
    hello, world = ids_of(embedded, "Hello")[0], ids_of(embedded, " world")[0]
    eos = frozenset({2})
    assert text_of(run(embedded, [hello, 2, world], SamplingParams(), eos)) == "Hello"
    assert text_of(run(embedded, [hello, 2, world], SamplingParams(ignore_eos=True), eos)) == "Hello world"
    explicit = SamplingParams(ignore_eos=True, stop_token_ids=eos)
    assert run(embedded, [hello, 2, world], explicit, eos)[-1] == TextDelta("", STOP)


def test_an_incomplete_character_at_the_limit_is_replaced(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = ids_of(byte_level, "a👩")
    deltas = run(byte_level, tokens, SamplingParams(max_tokens=len(tokens) - 1))
    assert deltas[-1] == TextDelta("\ufffd", LENGTH)
    assert text_of(deltas) == "a\ufffd"


def test_nothing_comes_after_the_last_token(embedded: PreTrainedTokenizerFast) -> None:
    stream = TextStream(embedded, SamplingParams(max_tokens=1), frozenset())
    stream.push(500)
    with pytest.raises(ValueError, match="token 501 comes after the last one"):
        stream.push(501)
    flushed = TextStream(embedded, SamplingParams(), frozenset())
    flushed.flush()
    assert flushed.flush() == ""
    with pytest.raises(ValueError, match="after the last"):
        flushed.push(500)


def test_finish_reasons_are_those_of_the_protocol() -> None:
    assert {one.value for one in FinishReason} == set(generation_pb2.FinishReason.values()) - {0}
    for one in FinishReason:
        assert generation_pb2.FinishReason.Name(one.to_proto()) == f"FINISH_REASON_{one.name}"
        assert FinishReason.from_proto(one.to_proto()) is one
    with pytest.raises(ValueError, match="0 is not a valid FinishReason"):
        FinishReason.from_proto(generation_pb2.FINISH_REASON_UNSPECIFIED)


def test_a_stop_string_is_found_at_the_start_of_an_answer(byte_fallback: PreTrainedTokenizerFast) -> None:
    ids = byte_fallback.convert_tokens_to_ids
    stream = TextStream(byte_fallback, SamplingParams(stop=(" the",)), frozenset(), ids(["▁a", "b"]))
    assert stream.push(ids("▁the")) == TextDelta("", STOP)
    stream = TextStream(byte_fallback, SamplingParams(), frozenset(), ids(["▁a", "b"]))
    assert stream.push(ids("▁the")) == TextDelta(" the")


def test_a_stop_string_that_is_a_special_token_stops_at_it(embedded: PreTrainedTokenizerFast) -> None:
    end = embedded.convert_tokens_to_ids("<|im_end|>")
    params = SamplingParams(ignore_eos=True, stop=("never", "<|im_end|>"))
    assert run(embedded, [*ids_of(embedded, "Hi"), end, 5], params, frozenset({end})) == [
        TextDelta("Hi"),
        TextDelta("", STOP),
    ]


def test_stop_strings_are_not_heeded_before_min_tokens(embedded: PreTrainedTokenizerFast) -> None:
    (token_id,) = embedded.encode(" the", add_special_tokens=False)
    params = SamplingParams(max_tokens=8, min_tokens=3, stop=("the",))
    stream = TextStream(embedded, params, frozenset())
    deltas = [stream.push(token_id) for _ in range(4)]
    assert "".join(delta.text for delta in deltas) == " the the the "
    assert [delta.finish for delta in deltas] == [None, None, None, FinishReason.STOP]
