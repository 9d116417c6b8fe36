"""Small tokenizers of the kinds that language models have, made here so that nothing is downloaded."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte and a few words, as in GPT-2, Llama 3 and Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *alphabet])}
    merges = [("a", "b"), ("Ġ", "a"), ("Ġa", "b"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece-like, as in Llama 2: spaces are "▁", unknown characters fall back to bytes."""
    return _sentencepiece(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )


def metaspace() -> PreTrainedTokenizerFast:
    """Byte fallback with the decoder that T5-like and newer SentencePiece conversions have."""
    return _sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def word_pieces() -> PreTrainedTokenizerFast:
    """The tokens "a", "##b" and "." whose decoder also tidies up spaces."""
    vocabulary = {
        token: place for place, token in enumerate([*SPECIAL, "a", "##b", ".", "'", "s", "do", "not", "中"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer)


def chat_ml(normalizer: normalizers.Normalizer | None = None, special: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the added tokens of ChatML, which `normalizer` may make out of look-alikes.

    Args:
        normalizer: the tokenizer's; the added tokens are then found in normalized text.
        special: whether the added tokens are special ones.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer.add_tokens(
        [
            AddedToken(name, special=special and name.startswith("<|"), normalized=normalizer is not None)
            for name in names
        ]
    )
    return _finished(tokenizer)


KINDS = {one.__name__: one for one in (byte_level, byte_fallback, metaspace, word_pieces)}


def _sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        "a",
        "b",
        "▁a",
        "▁the",
        "ab",
        "é",
        "中",
    ]
    tokenizer = Tokenizer(
        models.BPE({token: place for place, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
