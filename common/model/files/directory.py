"""Finds the directory that holds a model, and what in it is read.

The directory is the embedded default's, a local one, or a download from the hub.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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

from spectrumkv.common.errors import FailedPreconditionError, SpectrumKVError
from spectrumkv.common.files import check_regular, read_text
from spectrumkv.common.model.embedded import EMBEDDED_MODEL_NAME, embedded_model_directory, is_converted

# Weights as safetensors only: the other formats are pickles, which run code when they are read.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]
# Copies of the same weights in other formats, such as "onnx/" and Mistral's own.
_NOT_FROM_HUB = ["*/*", "consolidated*"]

_MORE_TEMPLATES = "additional_chat_templates/*"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# A longer explanation of a library is cut: some are pages.
_LONGEST_EXPLANATION = 400

# Errors of the system that say nothing against a file. Libraries may pass on the text alone, inside their own error.
_NOT_THE_FILES_FAULT = {
    errno.ENOMEM: "give the service more memory or name a smaller model",
    # Before EMFILE, whose text its own begins with.
    errno.ENFILE: "let this machine open more files (fs.file-max)",
    errno.EMFILE: "let this process open more files (ulimit -n)",
    errno.EACCES: "let this process's user read it",
}

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
    local = _local_directory(name)
    if local is not None:
        return local.resolve().name, local
    downloaded = _download(name)
    _check_complete(name, downloaded)
    return name, downloaded


def find_present_model(name: str | None) -> tuple[str, Path] | None:
    """Find a model without fetching anything.

    Args:
        name: as `find_model` takes it.

    Returns:
        As `find_model`; None where the model would have to be fetched first.

    Raises:
        FailedPreconditionError: there can be no such model, or it lacks a file.
    """
    if name is None:
        return find_model(None) if is_converted() else None
    local = _local_directory(name)
    if local is not None:
        return local.resolve().name, local
    try:
        downloaded = Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FROM_HUB, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(_explain(name, error)) from error
    _check_complete(name, downloaded)
    return name, downloaded


def _local_directory(name: str) -> Path | None:
    """Return the directory that a name stands for; None where it may be a name of the hub.

    Raises:
        FailedPreconditionError: it is neither, or the directory lacks a file.
    """
    with refuse_damage(f"model {name!r}"):
        local = Path(name).expanduser()
        is_directory = local.is_dir()
    if is_directory:
        _check_complete(name, local)
        return local
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or local.exists():
        raise FailedPreconditionError(
            f"model {name!r} is not a directory; name a directory with config.json, *.safetensors and tokenizer "
            "files, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    return None


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers reads a model's weights from, sorted by name.

    Of several files it reads those that the index names, and no others: a shard of another model may lie beside them.

    Args:
        directory: the model's.

    Raises:
        FailedPreconditionError: there are none, the index cannot be read, or it names a file that is not there.
    """
    if (directory / _WEIGHTS).is_file():
        return (directory / _WEIGHTS,)
    if (directory / _INDEX).is_file():
        return _indexed(directory)
    if any(directory.glob("model-*-of-*.safetensors")):
        raise FailedPreconditionError(
            f"{directory} holds shards of the weights without {_INDEX}, which says what is in each; "
            "fetch the model again"
        )
    raise FailedPreconditionError(
        f"{directory} holds no {_WEIGHTS} or {_INDEX}; "
        "weights in other formats are not read: convert them with save_pretrained()"
    )


def _indexed(directory: Path) -> tuple[Path, ...]:
    with refuse_damage(f"{_INDEX} of the model in {directory}"):
        names = set(json.loads(read_text(directory / _INDEX))["weight_map"].values())
        if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ValueError(f"weight_map names {odd[0]!r}, which is no file's name")
        if not names:
            raise ValueError("weight_map is empty")
    files = tuple(directory / name for name in sorted(names))
    if missing := [file.name for file in files if not file.is_file()]:
        raise FailedPreconditionError(
            f"{directory} lacks {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which {_INDEX} names; "
            "fetch the model again"
        )
    return files


@contextmanager
def refuse_damage(what: str) -> Iterator[None]:
    """Turn what libraries raise over a damaged file into a sentence.

    Args:
        what: the file, as the sentence names it.

    Yields:
        Nothing: the block reads the file.

    Raises:
        FailedPreconditionError: the block raised something else than a `SpectrumKVError`.
        SpectrumKVError: the block raised it.
    """
    try:
        yield
    except SpectrumKVError:
        raise
    except Exception as error:  # any type: tokenizers raises Exception itself
        explanation = " ".join(str(error).split())
        if isinstance(error, LookupError | ArithmeticError | AttributeError) or not explanation:
            # These say little without their names.
            explanation = f"{type(error).__name__} {explanation}".strip()
        remedy = _remedy(error)
        if len(explanation) > _LONGEST_EXPLANATION:
            explanation = f"{explanation[:_LONGEST_EXPLANATION]}…"
        raise FailedPreconditionError(f"cannot read {what}: {explanation}; {remedy}") from error


def _remedy(error: Exception) -> str:
    """Return what to do about an error in reading a file."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    for cause, remedy in _NOT_THE_FILES_FAULT.items():
        if number == cause or os.strerror(cause) in str(error):
            return remedy
    return "correct it or fetch the model again"


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
    with refuse_damage(f"model {name!r}"):
        for file in (*directory.iterdir(), *directory.glob(_MORE_TEMPLATES)):
            check_regular(file)


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
