"""Finds the directory that holds a model, and what in it is read.

The directory is the embedded default's, a local one, or a download from the hub.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

# HTTPError is the base class of the HTTP library that this release of huggingface_hub is built on; it is
# imported there, though not exported.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.embedded import EMBEDDED_MODEL_NAME, embedded_model_directory

# Weights as safetensors only: the other formats are pickles, which run code when they are read.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]
# Copies of the same weights in other formats, such as "onnx/" and Mistral's own.
_NOT_FROM_HUB = ["*/*", "consolidated*"]

# The class that transformers names for a tokenizer that is all that tokenizer.json says.
GENERIC_TOKENIZER = "TokenizersBackend"


def find_model(name: str | None) -> tuple[str, Path]:
    """Find a model, and download it from the hub where it is not here.

    Args:
        name: a local directory, a hub name ("organization/model"), or None for the embedded default.

    Returns:
        The name that clients call the model by, and its directory.

    Raises:
        FailedPreconditionError: there is no such model, it cannot be fetched, or it lacks a file.
    """
    if name is None:
        return EMBEDDED_MODEL_NAME, embedded_model_directory()
    local = Path(name).expanduser()
    if local.is_dir():
        _check_complete(name, local)
        return local.resolve().name, local
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or local.exists():
        raise FailedPreconditionError(
            f"model {name!r} is not a directory; name a directory with config.json, *.safetensors and tokenizer "
            "files, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    downloaded = _download(name)
    _check_complete(name, downloaded)
    return name, downloaded


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers reads a model's weights from, sorted by name.

    Raises:
        FailedPreconditionError: there are none.
    """
    single = directory / "model.safetensors"
    files = (single,) if single.is_file() else tuple(sorted(directory.glob("model-*-of-*.safetensors")))
    if not files:
        raise FailedPreconditionError(
            f"{directory} holds no model.safetensors or model-*-of-*.safetensors; "
            "weights in other formats are not read: convert them with save_pretrained()"
        )
    return files


def tokenizer_class(directory: Path) -> type[AutoTokenizer] | type[PreTrainedTokenizerFast]:
    """Return the class whose `from_pretrained` reads the tokenizer in a directory.

    For some types of models, Qwen2 among them, AutoTokenizer splits text as those models' own tokenizers do and not
    as tokenizer.json says, even where the tokenizer's configuration names the generic class.

    Args:
        directory: holds the tokenizer's files.

    Raises:
        OSError: the tokenizer's configuration cannot be read.
        ValueError: the tokenizer's configuration is not JSON.
    """
    declared = get_tokenizer_config(directory, local_files_only=True).get("tokenizer_class")
    reader: type[AutoTokenizer] | type[PreTrainedTokenizerFast] = AutoTokenizer
    if declared == GENERIC_TOKENIZER:
        reader = PreTrainedTokenizerFast
    return reader


def _check_complete(name: str, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise FailedPreconditionError(f"model {name!r} has no config.json in {directory}; is it a model's directory?")
    weight_files(directory)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FROM_HUB))
    except (OSError, ValueError, HTTPError) as error:
        raise FailedPreconditionError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"model {name!r} is gated; accept its terms on the hub, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name!r} is not a directory, and the hub has no model of that name; check the spelling, "
            "log in with `hf auth login` where it is private, or name a local directory"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name!r} is not a directory, and the hub cannot be reached to fetch a model of that name; "
            "connect to it, or name a local directory"
        )
    return f"cannot fetch model {name!r} from the hub: {error}"
