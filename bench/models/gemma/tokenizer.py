"""Turn the SentencePiece vocabulary of a GGUF file into a tokenizer of the `tokenizers` library.

SentencePiece's byte-pair encoding merges, again and again, the two neighbours whose joint piece has the highest
score. `tokenizers` merges the pair that stands first in a list, so the list has every pair of pieces that make a
piece, sorted by the score of what they make. A test compares both ways on random text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

# SentencePiece's sign for a space.
SPACE = "▁"


def build_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a file.

    Args:
        fields: of a GGUF file whose tokenizer is SentencePiece's byte-pair encoding with byte fallback (llama.cpp
            calls it "llama"), which adds no space before a text.

    Returns:
        The tokenizer; it puts the beginning-of-sequence token before a text, as Gemma was trained.
    """
    pieces: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    special = {
        name: pieces[fields[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    model = models.BPE(
        vocab={piece: token_id for token_id, piece in enumerate(pieces)},
        merges=_merges(pieces, fields["tokenizer.ggml.scores"], kinds),
        unk_token=special["unk"],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special['bos']} $A", special_tokens=[(special["bos"], pieces.index(special["bos"]))]
    )
    backend.add_special_tokens(
        [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == TokenType.CONTROL]
    )
    # Pieces such as runs of newlines, which SentencePiece finds before it merges anything.
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False, special=False)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind == TokenType.USER_DEFINED
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": token for name, token in special.items()},
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _merges(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make a piece, those first that SentencePiece would merge first.

    Of two overlapping pairs that make the same piece ("=" "===" "=" make "====" in two ways) SentencePiece takes the
    left one, which no list can say. The list has the pair with the longer left piece first, as where transformers
    converts SentencePiece's models.
    """
    token_ids = {
        piece: token_id
        for token_id, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind == TokenType.NORMAL
    }

    by_score = sorted(token_ids, key=lambda piece: scores[token_ids[piece]], reverse=True)
    return [
        (piece[:cut], piece[cut:])
        for piece in by_score
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in token_ids and piece[cut:] in token_ids
    ]
