"""What choosing tokens needs to know of a model's tokens."""

from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.structured.grammar import GrammarCompiler
from spectrumkv.common.generation.structured.trial import FormTrial


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one model.

    Attributes:
        tokenizer: the model's.
        eos_token_ids: the model's end-of-sequence tokens.
        size: rows of the model's embedding, which may be more than the tokenizer has tokens.
    """

    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    eos_token_ids: frozenset[int]
    size: int

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles forms of structured output; made when the first is asked for, which takes about a second."""
        from llguidance.hf import from_tokenizer

        eos = sorted(self.eos_token_ids) or None
        trial = FormTrial(self.tokenizer, self.size, eos)
        # It makes its own view meanwhile.
        trial.start()
        return GrammarCompiler(from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=eos), trial.refusal)

    def spellings(self, text: str) -> list[tuple[int, ...]]:
        """Return a text as tokens, at the start of a word and inside one; once where both are the same."""
        ways = (text.lstrip(), " " + text.lstrip()) if text.strip() else (text,)
        encoded = (self.tokenizer.encode(way, add_special_tokens=False, verbose=False) for way in ways)
        return list(dict.fromkeys(tuple(ids) for ids in encoded if ids))


def ending_token_ids(
    tokenizer: PreTrainedTokenizerFast, eos_token_ids: frozenset[int], params: SamplingParams
) -> frozenset[int]:
    """Return the tokens that end a generation: stop tokens, special tokens among the stop strings, and EOS.

    Args:
        tokenizer: the model's.
        eos_token_ids: the model's end-of-sequence tokens.
        params: of the request.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special and token.content in params.stop}
    ending = params.stop_token_ids | special
    return ending if params.ignore_eos else ending | eos_token_ids
