"""Which class reads a model's tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

# What transformers writes for a tokenizer that is all that tokenizer.json says.
GENERIC_CLASS = "TokenizersBackend"


def tokenizer_class(directory: Path) -> type[AutoTokenizer] | type[PreTrainedTokenizerFast]:
    """Return the class whose `from_pretrained` reads the tokenizer in a directory.

    For some types of models, Qwen2 among them, AutoTokenizer replaces what tokenizer.json says of splitting text by
    what those models' own tokenizers do, even where the tokenizer names itself a generic one.

    Raises:
        OSError: the tokenizer's configuration cannot be read.
        ValueError: it is no JSON.
    """
    declared = get_tokenizer_config(directory, local_files_only=True).get("tokenizer_class")
    reader: type[AutoTokenizer] | type[PreTrainedTokenizerFast] = AutoTokenizer
    if declared == GENERIC_CLASS:
        reader = PreTrainedTokenizerFast
    return reader
