"""Keeps codec bases between starts: a model is calibrated once."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from spectrumkv.common.errors import ContextTooShortError, FailedPreconditionError
from spectrumkv.common.files import read_bytes
from spectrumkv.common.generation.beginning import beginning_token, begun
from spectrumkv.common.kv.codecs.base import largest_basis_bytes, parse_basis
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.model.cache import (
    CACHE_VARIABLE,
    UnwritableCacheError,
    build_once,
    cache_directory,
    sha256_of_json,
)
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.prefill_server.tuning.calibration import Excerpt, calibrate, check_rotation
from spectrumkv.prefill_server.tuning.needle.haystack import haystack

logger = logging.getLogger(__name__)

# Raised whenever a calibration would find another basis than before.
CALIBRATION_VERSION = 2
EXCERPTS = 8
CONTEXT_TOKENS, CONTINUATION_TOKENS = 512, 128
# Shorter excerpts show too few tokens to tell the directions of a head apart.
FEWEST_CONTEXT_TOKENS = 64
BASIS_FILE = "basis.safetensors"
# SHA-256 of the basis in hexadecimal digits: no other check finds a number that has changed into another one.
DIGEST_FILE = "basis.sha256"
MOST_DIGEST_BYTES = 1024


def resolve_basis(loaded: LoadedModel, on_excerpt: Callable[[int], None]) -> Basis:
    """Return the model's basis: the one in the cache, or one that is calibrated now and kept there.

    Where the cache cannot be written to, the basis is in memory only, and a warning says so.

    Args:
        loaded: the model; where it is calibrated, its attention is switched to prefill's.
        on_excerpt: told the number of excerpts done, of `EXCERPTS`, where the model is calibrated.

    Raises:
        ContextTooShortError: the model's context is too short.
    """
    found: Basis | None = None

    def find() -> Basis:
        nonlocal found
        found = found or calibrate(loaded, default_excerpts(loaded), on_excerpt)
        return found

    try:
        return kept_basis(loaded.spec, loaded.geometry, find)
    except UnwritableCacheError as error:
        logger.warning("%s; until then each start calibrates the model again", error.message)
        return find()


def keep_basis(loaded: LoadedModel, basis: Basis) -> Path:
    """Keep a basis that was found on another machine, so that `resolve_basis` returns it from now on.

    Args:
        loaded: the model.
        basis: that fits the model's cache; it takes the place of the one that is kept.

    Returns:
        The directory that has it.

    Raises:
        InvalidArgumentError: the basis is for another model, or decode could not use it.
        FailedPreconditionError: the cache cannot be written to.
    """
    check_rotation(basis, loaded)
    basis.prepare_decoding()
    directory = _directory(loaded.spec)
    if kept_basis(loaded.spec, loaded.geometry, lambda: basis).digest != basis.digest:
        _replace(directory, basis)
    return directory


def _replace(directory: Path, basis: Basis) -> None:
    """Put a basis into the place of the one that is kept; a process that is killed here leaves a damaged entry.

    Raises:
        FailedPreconditionError: the cache cannot be written to.
    """
    partial = directory / f"{BASIS_FILE}.{os.getpid()}"
    try:
        for name, content in _contents(basis).items():
            partial.write_bytes(content)
            os.replace(partial, directory / name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FailedPreconditionError(
            f"cannot write to {directory}: {error}; make room or name another cache directory in {CACHE_VARIABLE}"
        ) from error


def _contents(basis: Basis) -> dict[str, bytes]:
    """Return the files of a basis's entry by name."""
    return {BASIS_FILE: basis.serialized, DIGEST_FILE: basis.digest.hex().encode()}


def _directory(spec: ModelSpec) -> Path:
    """Return where a model's basis is kept; one basis serves the model in every dtype that it computes in."""
    model = {name: value for name, value in asdict(spec).items() if name != "dtype"}
    return cache_directory() / "bases" / sha256_of_json({"model": model, "calibration": CALIBRATION_VERSION})


def kept_basis(spec: ModelSpec, geometry: KvGeometry, find: Callable[[], Basis]) -> Basis:
    """Return the model's basis: the one in the cache, or else one that is found now and kept there.

    Args:
        spec: of the model.
        geometry: shape and dtype of the model's cache.
        find: finds a basis, where none is kept.

    Returns:
        The basis.

    Raises:
        UnwritableCacheError: the cache cannot be written to.
    """

    def build(directory: Path) -> None:
        for name, content in _contents(find()).items():
            (directory / name).write_bytes(content)

    def read(directory: Path) -> Basis:
        basis = parse_basis(read_bytes(directory / BASIS_FILE, largest_basis_bytes(geometry)), geometry)
        if read_bytes(directory / DIGEST_FILE, MOST_DIGEST_BYTES).strip() != basis.digest.hex().encode():
            raise ValueError(f"{BASIS_FILE} is not what {DIGEST_FILE} announces")
        return basis

    return build_once(_directory(spec), "the model's basis", build, read)


def default_excerpts(loaded: LoadedModel) -> list[Excerpt]:
    """Return excerpts from the project's own prose.

    Raises:
        ContextTooShortError: the model's context is too short.
    """
    length = min(CONTEXT_TOKENS + CONTINUATION_TOKENS, loaded.context_length)
    context = length * CONTEXT_TOKENS // (CONTEXT_TOKENS + CONTINUATION_TOKENS)
    if context < FEWEST_CONTEXT_TOKENS:
        fewest = -(-FEWEST_CONTEXT_TOKENS * (CONTEXT_TOKENS + CONTINUATION_TOKENS) // CONTEXT_TOKENS)
        raise ContextTooShortError(
            f"calibration needs a context of {fewest} tokens and more, and {loaded.name} has {loaded.context_length}"
        )
    text = "".join(haystack(0).sentences)
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    beginning = beginning_token(loaded.tokenizer)
    starts = range(0, len(ids) - length + 1, max(1, (len(ids) - length) // (EXCERPTS - 1)))
    cut = [begun(ids[start : start + length], beginning) for start in list(starts)[:EXCERPTS]]
    return [Excerpt(torch.tensor(one), context) for one in cut]
